"""Which TP group is best for a request: a pure ranking, from facts that groups push every half second.

A group costs a request the seconds until its first token there: waiting behind the prompts of others, then
computing what of its own prompt is not cached. So it goes where its beginning is cached unless that group's
queue is longer, in seconds, than computing the beginning elsewhere would take. On an H100 with an 8B model
(27 us a token) a cached prefix of 4,096 tokens outweighs 0.11 s of queue, or five requests that are open; on
a laptop (2 ms a token) one of 200 tokens outweighs 0.4 s. On top of that come:

- what is beyond the promised time to the first token, three times more: slack that is gone costs a promise
- 20 ms for each request that is open: one decode more makes a step 40 us longer, over 500 tokens of an answer
- memory: a group whose pool and balloon are both more than four fifths full, up to the promised time again
- the controller's admission weight, by which all of it is divided
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.messages import EngineSnapshot
from engine.request_wire import EngineAddress

STALE_S = 3.0  # six periods of the push: older facts say nothing about now
CROWD_S = 0.02
LATE = 3.0
CROWDED = 0.8
_TOKEN_S = 1e-4  # a token of a prompt, until a group has said
_SLOWER = 4.0  # times as long as at others a token takes at most: an older GPU, or one that throttles
_ALIKE_S = 1e-3  # costs that differ by less are equal: then the request's home comes first, or chance decides


@dataclass(frozen=True, slots=True)
class GroupLoad:
    """What is known of one group.

    Attributes:
        queue_len: requests this router believes to be there, those on their way included.
        num_open: requests that the group has reported, waiting, running or parked; None if it has not.
        wait_s: that a new request would wait for its first token behind the prompts that wait now.
        oldest_wait_s: that the request which came first has waited for its.
        token_s: for each token of a prompt; 0 if it is not known.
        ttft_slo_s: what the model promises.
        pressure: how full pool and balloon are, the emptier one, 0 to 1.
        weight: of the controller, above 0 and at most 1.
        unseen_tokens: of prompts that this router has sent there since, as far as they are not cached.
        age_s: seconds since the pushed facts last changed.
    """

    queue_len: int
    num_open: int | None = None
    wait_s: float = 0.0
    oldest_wait_s: float = 0.0
    token_s: float = 0.0
    ttft_slo_s: float = 2.0
    pressure: float = 0.0
    weight: float = 1.0
    unseen_tokens: int = 0
    age_s: float = float("inf")

    @property
    def is_fresh(self) -> bool:
        """Whether the pushed facts can be trusted."""
        return self.num_open is not None and self.age_s <= STALE_S


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request is to the ranking.

    Attributes:
        prompt_tokens: of its prompt.
        cached_tokens: of them, what each group is believed to have.
        ttft_slo_s: what its client was promised; None is the model's own promise.
        home: index of the group to prefer among equals; None lets chance decide.
    """

    prompt_tokens: int
    cached_tokens: Sequence[int]
    ttft_slo_s: float | None = None
    home: int | None = None


def first_token_s(load: GroupLoad, prompt_tokens: int, cached_tokens: int) -> float:
    """Seconds until a request's first token in a group."""
    token_s = load.token_s or _TOKEN_S
    waiting_s = max(load.wait_s, load.oldest_wait_s) + load.unseen_tokens * token_s
    return waiting_s + max(0, prompt_tokens - cached_tokens) * token_s


def cost_s(load: GroupLoad, ask: Ask, cached_tokens: int) -> float:
    """What a request costs in a group with fresh facts: no less where there is more work, or less room."""
    promised_s = load.ttft_slo_s if ask.ttft_slo_s is None else ask.ttft_slo_s
    first_s = first_token_s(load, ask.prompt_tokens, cached_tokens)
    late_s = max(0.0, first_s - promised_s)
    crowd_s = CROWD_S * max(load.queue_len, load.num_open or 0)
    full = max(0.0, min(1.0, load.pressure) - CROWDED) / (1 - CROWDED)
    return (first_s + LATE * late_s + crowd_s + full * promised_s) / load.weight


def rank_groups(loads: Sequence[GroupLoad], ask: Ask, rng: random.Random) -> list[int]:
    """Indices of `loads`, best first.

    Groups with fresh facts by their cost. Of those without, one that is drawn comes before all others if this
    router has fewer requests there than at the best: power of two choices, so that several routers with the
    same old view do not all pick the same group. With no fresh facts at all, of two that are drawn.
    """
    order = list(range(len(loads)))
    rng.shuffle(order)
    fresh = [index for index in order if loads[index].is_fresh]
    loads = _alike(loads, fresh)
    stale = [index for index in order if not loads[index].is_fresh]
    if not fresh:
        return sorted(stale[:2], key=lambda index: loads[index].queue_len) + stale[2:]
    costs = {index: cost_s(loads[index], ask, ask.cached_tokens[index]) for index in fresh}
    fresh.sort(key=lambda index: (round(costs[index] / _ALIKE_S), index != ask.home))
    if stale and loads[stale[0]].queue_len < loads[fresh[0]].queue_len:
        return [stale[0], *fresh, *stale[1:]]
    return fresh + stale


def _alike(loads: Sequence[GroupLoad], fresh: Sequence[int]) -> Sequence[GroupLoad]:
    """Groups of one model take about as long for a token. One that believes otherwise, since its last prompt
    met with a pause or a compiler, would not be sent the next, which would teach it better.
    """
    known = [loads[index].token_s for index in fresh if loads[index].token_s]
    most = _SLOWER * statistics.median_low(known) if len(known) > 1 else math.inf
    if max(known, default=0.0) <= most:
        return loads
    return [replace(load, token_s=min(load.token_s, most)) for load in loads]


def routing_stats(
    snapshot: EngineSnapshot, ttft_slo_s: float, door: EngineAddress | None = None
) -> dict[str, Any]:
    """What a group pushes; the router reads it."""
    memory, order = snapshot.memory, snapshot.order
    # Of live sequences alone: cached prefixes are given up when a request needs their memory.
    pool = memory.kv / max(memory.total, 1)
    limit = min(memory.balloon_limit, order.balloon_logical_bytes // memory.chunk_bytes if order else 1 << 62)
    balloon = (memory.balloon - memory.balloon_cached) / limit if limit > 0 else 1.0
    return {
        "num_open": snapshot.num_running + snapshot.num_waiting + snapshot.num_parked,
        "wait_s": snapshot.expected_ttft_s,
        "oldest_wait_s": snapshot.oldest_wait_s,
        "token_s": snapshot.prompt_token_s,
        "ttft_slo_s": ttft_slo_s,
        "pressure": min(pool, balloon),
        "weight": order.admission_weight if order is not None else 1.0,
        "capacity_tokens": _capacity_tokens(snapshot),
        "door": None if door is None else (door.address, door.secret.hex()),
        "beat_s": snapshot.monotonic_s,  # an idle group's other facts do not change
    }


def load_of(stats: Mapping[str, float], queue_len: int, unseen_tokens: int, age_s: float) -> GroupLoad:
    """What a group has pushed, beside what this router knows of it itself."""
    num_open = stats.get("num_open")
    return GroupLoad(
        queue_len=queue_len,
        num_open=None if num_open is None else int(num_open),
        wait_s=stats.get("wait_s", 0.0),
        oldest_wait_s=stats.get("oldest_wait_s", 0.0),
        token_s=stats.get("token_s", 0.0),
        ttft_slo_s=stats.get("ttft_slo_s", 2.0),
        pressure=stats.get("pressure", 0.0),
        weight=stats.get("weight", 1.0),
        unseen_tokens=unseen_tokens,
        age_s=age_s,
    )


def door_of(stats: Mapping[str, Any]) -> EngineAddress | None:
    """Where the group's engine takes requests past Ray; None if it has not told."""
    if (told := stats.get("door")) is None:
        return None
    address, secret = told
    return EngineAddress(address, bytes.fromhex(secret))


def _capacity_tokens(snapshot: EngineSnapshot) -> float:
    """Tokens whose KV pool and balloon can hold, as far as the KV that is there tells; 0 if there is none."""
    memory = snapshot.memory
    if not memory.kv or not memory.kv_tokens:
        return 0.0
    return (memory.total + memory.balloon_limit) * memory.kv_tokens / memory.kv
