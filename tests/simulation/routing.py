"""Conversations and a prefix that everybody has, over groups with prefix caches, in virtual time.

The real ranking and the real record. A group is coarse: it computes prompts one after another at a rate,
without what is cached, and holds a request open for its answer. Facts are pushed every half second.
"""

from __future__ import annotations

import random
import statistics
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from cluster.prefix_record import BLOCK_TOKENS, PrefixRecord, chain_of
from cluster.ranking import Ask, GroupLoad, rank_groups

_TOKEN_S = 1e-4
_ANSWER_S = 4.0
_PUSH_S = 0.5
Route = Callable[["Fleet", Sequence[int], float], int]


@dataclass
class _Group:
    idle_at: float = 0.0
    num_open: int = 0
    computed: int = 0
    cache: OrderedDict[bytes, None] = field(default_factory=OrderedDict)


@dataclass
class Fleet:
    """Groups, and what a router knows of them.

    Attributes:
        cached, asked: tokens of prompts.
        waits_s: to each first token.
    """

    num_groups: int
    seed: int = 1
    cached: int = 0
    asked: int = 0
    waits_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.groups = [_Group() for _ in range(self.num_groups)]
        self.rng = random.Random(self.seed)
        self.record: PrefixRecord[int] = PrefixRecord(2000)
        self.pushed = [(0.0, 0)] * self.num_groups
        self.unseen = [0] * self.num_groups
        self.sent: Counter[int] = Counter()

    @property
    def imbalance(self) -> float:
        """Tokens computed by the busiest group, over the mean."""
        computed = [group.computed for group in self.groups]
        return max(computed) / statistics.mean(computed)

    def push(self, now: float) -> None:
        """All groups tell their facts."""
        self.pushed = [(max(0.0, one.idle_at - now), one.num_open) for one in self.groups]
        self.unseen = [0] * self.num_groups

    def serve(self, at: int, prompt: Sequence[int], now: float) -> None:
        """A prompt is computed by a group, but for what that has."""
        group, chain = self.groups[at], chain_of(prompt, "")
        found = 0
        while found < len(chain) and chain[found] in group.cache:
            found += 1
        for digest in reversed(chain):
            group.cache[digest] = None
            group.cache.move_to_end(digest)
        while len(group.cache) > 2000:
            group.cache.popitem(last=False)
        work = len(prompt) - found * BLOCK_TOKENS
        group.idle_at = max(group.idle_at, now) + work * _TOKEN_S
        group.computed += work
        group.num_open += 1
        self.sent[at] += 1
        self.cached += found * BLOCK_TOKENS
        self.asked += len(prompt)
        self.waits_s.append(group.idle_at - now)


def by_slack(fleet: Fleet, prompt: Sequence[int], now: float) -> int:
    """The router as it is."""
    chain = chain_of(prompt, "")
    cached = [fleet.record.cached_tokens(at, chain) for at in range(fleet.num_groups)]
    loads = [
        GroupLoad(group.num_open, num_open, wait_s, token_s=_TOKEN_S, unseen_tokens=unseen, age_s=0.1)
        for group, (wait_s, num_open), unseen in zip(fleet.groups, fleet.pushed, fleet.unseen, strict=True)
    ]
    best = rank_groups(loads, Ask(len(prompt), cached), fleet.rng)[0]
    fleet.record.sent(best, chain)
    fleet.unseen[best] += len(prompt) - cached[best]
    return best


def by_work(fleet: Fleet, prompt: Sequence[int], now: float) -> int:
    """The fewest open requests."""
    return min(range(fleet.num_groups), key=lambda at: (fleet.groups[at].num_open, fleet.rng.random()))


def by_chance(fleet: Fleet, prompt: Sequence[int], now: float) -> int:
    """Any."""
    return fleet.rng.randrange(fleet.num_groups)


def serve_chats(
    route: Route, num_groups: int = 8, num_chats: int = 60, turns: int = 8, shared_tokens: int = 1024
) -> Fleet:
    """Conversations that begin with the same tokens, and grow by 600 a turn; each turn comes when the answer
    before it has been read."""
    fleet, dice = Fleet(num_groups), random.Random(7)
    shared = [dice.randrange(30_000) for _ in range(shared_tokens)]
    talks = [[*shared] for _ in range(num_chats)]
    events: list[tuple[float, int, int, int]] = []
    for chat in range(num_chats):
        heappush(events, (dice.uniform(0, 20), 1, chat, 0))
    heappush(events, (0.0, 0, 0, 0))
    while any(kind == 1 or kind == 2 for _, kind, _, _ in events):
        now, kind, who, turn = heappop(events)
        if kind == 0:
            fleet.push(now)
            heappush(events, (now + _PUSH_S, 0, 0, 0))
        elif kind == 1:
            talks[who] += [dice.randrange(30_000) for _ in range(600)]
            at = route(fleet, talks[who], now)
            fleet.serve(at, talks[who], now)
            end = fleet.groups[at].idle_at + _ANSWER_S
            heappush(events, (end, 2, at, 0))
            if turn + 1 < turns:
                heappush(events, (end + dice.uniform(0, 4), 1, who, turn + 1))
        else:
            fleet.groups[who].num_open -= 1
    return fleet
