"""How many groups each model should have: as many as its load takes when memory does not help, one fewer when
it is idle.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from cluster.policy_facts import ENOUGH, Kept, Outlook

_ROOMY = 0.5  # of the remaining groups' pools: with less in use, one of them can go
_QUICK = 0.25  # of the promised time to the first token
_CLEARED_S = 60.0  # a queue that has grown is to be gone in a minute
_MOST = 4  # times the groups there are; what comes in during some seconds is a rough measure


class ReplicaConfig(Protocol):
    """The constants that count here; `cluster.policy.PolicyConfig` explains them."""

    @property
    def target(self) -> float: ...

    @property
    def headroom(self) -> float: ...

    @property
    def replica_patience_s(self) -> float: ...

    @property
    def compute_patience_s(self) -> float: ...

    @property
    def replica_idle_s(self) -> float: ...


class Traffic(NamedTuple):
    """Requests of a model that have ended so far, are open, or were not taken by a group; promises so far."""

    ended: int
    open: int
    refused: int
    kept: int
    missed: int


@dataclass(frozen=True, slots=True)
class ModelState:
    """One model.

    Attributes:
        num_groups: that answer.
        wanted: groups that it should have.
        late_since, idle_since: when it began to be late though it has all the memory there is for it, and
            when it began to need a group less; infinite if it is not late, or needs them all.
        calm_since, calm_from: since when it has kept its promises, and its traffic then.
        traffic, late_from: now, and when it began to be late.
        changed: why `wanted` has just changed; empty if it has not.
    """

    num_groups: int
    wanted: int
    late_since: float = math.inf
    idle_since: float = math.inf
    calm_since: float = math.inf
    calm_from: Traffic | None = None
    traffic: Traffic = Traffic(0, 0, 0, 0, 0)
    late_from: Traffic | None = None
    changed: str = ""


def judge_models(
    groups: Mapping[str, Outlook], before: Mapping[str, ModelState], config: ReplicaConfig, now: float
) -> tuple[dict[str, ModelState], dict[str, int]]:
    """Every model's state, and the groups that each should have."""
    members: dict[str, list[Outlook]] = defaultdict(list)
    for one in groups.values():
        members[one.facts.model_id].append(one)
    models = {
        model_id: _judge(found, before.get(model_id, ModelState(len(found), len(found))), config, now)
        for model_id, found in members.items()
    }
    return models, {model_id: model.wanted for model_id, model in models.items()}


def _judge(members: list[Outlook], before: ModelState, config: ReplicaConfig, now: float) -> ModelState:
    count, traffic = len(members), _traffic(members)
    late_since, idle_since, late_from = before.late_since, before.idle_since, before.late_from
    if count != before.num_groups:  # what was asked for has come, or gone: judge anew
        late_since, idle_since, late_from = math.inf, math.inf, None
    calm_since, calm_from = before.calm_since, before.calm_from
    if calm_from is None or not _is_calm(members, calm_from, traffic, config):
        calm_since, calm_from = now, traffic
    is_calm = now - calm_since >= config.compute_patience_s
    is_late = not is_calm and _is_late(members, config)
    if not is_late:
        late_since, late_from = math.inf, None
    elif late_from is None or traffic.ended < before.traffic.ended:
        late_since, late_from = now, traffic  # the latter: an engine that started again counts anew
    idle_since = min(idle_since, now) if not is_late and _is_idle(members, config) else math.inf
    # A wish stays while its groups start, one after another; more than that are somebody else's wish.
    wanted, why = max(count, before.wanted) if count != before.num_groups else before.wanted, ""
    if late_from is not None and now - late_since >= _patience_s(members, config):
        waiting = sum(one.facts.num_waiting for one in members)
        enough = _enough(count, late_from, traffic, waiting, now - late_since)
        wanted, why = max(wanted, enough), "memory_does_not_help"
    elif now - idle_since >= config.replica_idle_s:
        wanted, why = max(1, count - 1), "idle"
    elif wanted > count and is_calm:
        wanted, why = count, "in_time_again"  # it was a burst, and may be over before Serve's own delay is
    changed = why if wanted != before.wanted else ""
    calm = calm_since, calm_from
    return ModelState(count, wanted, late_since, idle_since, *calm, traffic, late_from, changed)


def _traffic(members: list[Outlook]) -> Traffic:
    facts = [one.facts for one in members]
    return Traffic(
        sum(one.num_ended for one in facts),
        sum(one.num_open for one in facts),
        sum(one.num_refused for one in facts),
        sum(one.first[0] + one.paced[0] for one in facts),
        sum(one.first[1] + one.paced[1] for one in facts),
    )


def _enough(count: int, then: Traffic, now: Traffic, num_waiting: int, passed_s: float) -> int:
    """Groups that could end what comes in, by what these ended while they did all they could. With one more
    each time, half a minute after another, three times the load was late for two and a half minutes.

    Args:
        then: when the model began to be late, so many seconds ago.
        num_waiting: for a first token; they are to be served as well, within a while.
    """
    ended = now.ended - then.ended
    if ended < ENOUGH:
        return 2 * count
    # A request that one group does not take is sent to the others.
    came = ended + now.open - then.open + max(0, now.refused - then.refused) / count
    needed = math.ceil(count * (came + num_waiting * passed_s / _CLEARED_S) / ended)
    return min(max(needed, count + 1), _MOST * count)


def _patience_s(members: list[Outlook], config: ReplicaConfig) -> float:
    """Memory lets first tokens come earlier at the cost of next ones, or the other way round: where both are
    late, there is nothing to wait for.
    """
    first, pace = (_share(members, name) for name in ("first", "pace"))
    return config.compute_patience_s if max(first, pace) < config.target else config.replica_patience_s


def _is_late(members: list[Outlook], config: ReplicaConfig) -> bool:
    """Whether promises are broken though no group lacks memory that it could yet be given."""
    kept = sum(one.first.kept + one.pace.kept for one in members)
    missed = sum(one.first.missed + one.pace.missed for one in members)
    waits = any(one.facts.num_waiting_late for one in members)
    is_late = waits or (kept + missed >= ENOUGH and kept / (kept + missed) < config.target)
    has_grown = all(one.levers.size.direction != 1 or _is_used(one) for one in members)
    return is_late and has_grown


def _share(members: list[Outlook], name: Literal["first", "pace"]) -> float:
    """Of a kind of promises, those that all groups kept together."""
    several: list[Kept] = [getattr(one, name) for one in members]
    return Kept(sum(one.kept for one in several), sum(one.missed for one in several)).share


def _is_calm(members: list[Outlook], then: Traffic, now: Traffic, config: ReplicaConfig) -> bool:
    """Whether no more promises were broken since then than may be, or one. In `Kept` what was before that
    counts for half a minute, in which Serve would begin to start groups for a burst that is over.
    """
    kept, missed = now.kept - then.kept, now.missed - then.missed
    waits = any(one.facts.num_waiting_late for one in members)
    return not waits and kept >= 0 <= missed <= max(1, (1 - config.target) * (kept + missed))


def _is_used(one: Outlook) -> bool:
    """Whether what a group was given is there: until then it may still help."""
    return (
        one.facts.physical + one.facts.slab > one.levers.size.value or one.facts.held < one.facts.physical / 2
    )


def _is_idle(members: list[Outlook], config: ReplicaConfig) -> bool:
    """Whether a group less could do it; of a single one, whether it does by itself."""
    pools = sum(one.facts.pool for one in members) * max(1, len(members) - 1) / len(members)
    used = sum(one.facts.num_open * one.sequence_bytes for one in members)
    quick = all(one.facts.expected_ttft_s <= _QUICK * one.facts.ttft_slo_s for one in members)
    kept = all(min(one.first.share, one.pace.share) >= config.target for one in members)
    return quick and kept and used <= _ROOMY * pools
