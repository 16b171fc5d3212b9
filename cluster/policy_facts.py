"""What the policy knows of one group: facts of its newest report, and what it remembers of earlier ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from cluster.reports import GroupReport
from engine.control import Order
from engine.messages import EngineSnapshot

JUDGED_S = 10.0  # promises of that long ago count 1/e: a few hundred requests at 30 a second
ENOUGH = 5.0  # promises, faded, to judge by
_USABLE = 0.9  # of the pool, for KV: activations and the ends of chunks take the rest
_KEPT, _FULL, _STEP = (
    0.95,
    0.8,
    1.25,
)  # late with a full pool: a quarter more, and again if that is too little
_TYPICAL = 1 / 16  # of the pool, for a sequence, until one has been seen


@dataclass(frozen=True, slots=True)
class Facts:
    """One group now. Sizes are bytes of the node: those of rank 0 times the ranks.

    Attributes:
        slab: 0 if it has no balloon.
        physical, limit: of the balloon: there, and allowed.
        held: of it, KV that sequences need.
        pool, kv: of the device, and of it KV of live sequences.
        device: that the group shares with others, named within the node; empty if it has it alone.
        pool_own, pool_limit, pool_held, pool_floor: what its pool is configured to, what it may have by the
            order that it obeys, what it has, and what it needs for the longest of its requests.
        chunk: what pools grow and shrink by.
        first, paced: (kept, not kept) promises since start; who was not taken got no first token in time.
        num_ended, num_refused: requests since start that have ended, and that were not taken.
    """

    group_id: str
    model_id: str
    node_id: str
    num_ranks: int
    slab: int
    physical: int
    limit: int
    held: int
    pool: int
    kv: int
    num_waiting: int
    num_waiting_late: int
    num_running: int
    num_parked: int
    num_parked_late: int
    expected_ttft_s: float
    ttft_slo_s: float
    first: tuple[int, int]
    paced: tuple[int, int]
    num_ended: int
    num_refused: int
    host_total: int
    host_available: int
    device: str = ""
    pool_own: int = 0
    pool_limit: int = 0
    pool_held: int = 0
    pool_floor: int = 0
    chunk: int = 1

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return self.num_waiting + self.num_running + self.num_parked


def facts_of(report: GroupReport) -> Facts | None:
    """The facts of a report; None if its engine does not answer."""
    if report.snapshot is None:
        return None
    now: EngineSnapshot = report.snapshot
    memory, host = now.memory, now.host
    unit = memory.chunk_bytes * report.num_ranks
    num_refused = sum([count for name, count in now.decisions if name in ("shed", "refuse")])
    return Facts(
        group_id=report.group_id,
        model_id=report.model_id,
        node_id=host.node_id if host else report.group_id,
        num_ranks=report.num_ranks,
        slab=memory.balloon_slab * unit,
        physical=memory.balloon_physical * unit,
        limit=memory.balloon_limit * unit,
        held=(memory.balloon - memory.balloon_cached) * unit,
        pool=memory.total * unit,
        kv=memory.kv * unit,
        num_waiting=now.num_waiting,
        num_waiting_late=now.num_waiting_late,
        num_running=now.num_running,
        num_parked=now.num_parked,
        num_parked_late=now.num_parked_late,
        expected_ttft_s=now.expected_ttft_s,
        ttft_slo_s=report.ttft_slo_s,
        first=(now.first_in_time, now.first_late + num_refused),
        paced=(now.paced_in_time, now.paced_late),
        num_ended=sum([count for _, count in now.finished]),
        num_refused=num_refused,
        host_total=host.total_bytes if host else 0,
        host_available=host.available_bytes if host else 0,
        device=now.shared_device,
        pool_own=memory.configured * unit,
        pool_limit=memory.limit * unit,
        pool_held=memory.created * unit,
        pool_floor=memory.floor * unit,
        chunk=unit,
    )


@dataclass(frozen=True, slots=True)
class Lever:
    """A value, and which way it went last: 1 up, -1 down, 0 unknown, for one that was found where it is."""

    value: float
    direction: int = 0
    moved_s: float = -math.inf

    def may_move(self, direction: int, now: float, dwell_s: float) -> bool:
        """Whether it may go that way by now."""
        return direction == self.direction or now - self.moved_s >= dwell_s

    def to(self, value: float, now: float) -> Lever:
        """Moved."""
        return self if value == self.value else Lever(value, 1 if value > self.value else -1, now)


@dataclass(frozen=True, slots=True)
class Levers:
    """All of one group, in bytes of the node. `size`: of its balloon. `pool`: the limit of its pool, where it
    shares a device; 0 as long as nobody has divided that.
    """

    size: Lever
    weight: Lever = Lever(1.0)
    retention: Lever = Lever(1.0)
    pool: Lever = Lever(0.0)

    @classmethod
    def of_order(cls, order: Order, num_ranks: int, now: float) -> Levers:
        """Where an earlier controller left them; they rest for a dwell time."""
        size, pool = order.balloon_logical_bytes * num_ranks, (order.pool_bytes or 0) * num_ranks
        return cls(*(Lever(value, 0, now) for value in (size, order.admission_weight, order.retention, pool)))


@dataclass(frozen=True, slots=True)
class Kept:
    """Promises kept and not kept lately: older ones fade."""

    kept: float = 0.0
    missed: float = 0.0

    @property
    def share(self) -> float:
        """Of those kept; 1 while hardly any are known."""
        known = self.kept + self.missed
        return self.kept / known if known >= ENOUGH else 1.0

    def then(self, before: tuple[int, int], now: tuple[int, int], passed_s: float) -> Kept:
        """After so many seconds, in which the counts grew; an engine that started again counts from 0."""
        fade = math.exp(-passed_s / JUDGED_S)
        kept, missed = now
        if kept >= before[0]:
            kept -= before[0]
        if missed >= before[1]:
            missed -= before[1]
        return Kept(self.kept * fade + kept, self.missed * fade + missed)


@dataclass(frozen=True, slots=True)
class Outlook:
    """A group with its history.

    Attributes:
        need: host memory that it could make use of; what has gone fades.
        pool_need: the same of a device that it shares.
        seen_s: of the facts.
        sequence_bytes: KV of an open request, on average.
        first, pace: promises of first and next tokens.
        pace_late_since: when next tokens began to be late; infinite if they are in time.
        reason: of the newest order, in words.
        why: by lever, the reason of its last move in one word.
    """

    facts: Facts
    levers: Levers
    need: float
    seen_s: float
    pool_need: float = 0.0
    sequence_bytes: float = 0.0
    first: Kept = Kept()
    pace: Kept = Kept()
    pace_late_since: float = math.inf
    reason: str = "as it was"
    why: Mapping[str, str] = field(default_factory=dict)

    def with_size(self, size: int, now: float, why: str) -> Outlook:
        """Its balloon moved."""
        if size == self.levers.size.value:
            return self
        verb = "grow" if size > self.levers.size.value else "shrink"
        told = f"balloon: {verb} to {size / 2**30:.2f} GiB ({why}; it needs {self.need / 2**30:.2f})"
        return self._moved("balloon", replace(self.levers, size=self.levers.size.to(size, now)), told, why)

    @property
    def pool_lever(self) -> Lever:
        """The limit of its pool; where nobody has moved it yet, as the engine has it."""
        return self.levers.pool if self.levers.pool.value else Lever(self.facts.pool_limit)

    def with_pool(self, size: int, now: float, why: str) -> Outlook:
        """The limit of its pool moved, or is the controller's from now on."""
        before = self.pool_lever
        levers = replace(self.levers, pool=before.to(size, now))
        if size == before.value:
            return replace(self, levers=levers)
        verb = "grow" if size > before.value else "shrink"
        told = f"pool: {verb} to {size / 2**30:.2f} GiB ({why}; it needs {self.pool_need / 2**30:.2f})"
        return self._moved("pool", levers, told, why)

    def with_lever(
        self, name: Literal["weight", "retention"], value: float, now: float, dwell_s: float, why: str
    ) -> Outlook:
        """Its admission weight or its layer retention moved, if it may."""
        lever: Lever = getattr(self.levers, name)
        if not _may(lever, value, now, dwell_s):
            return self
        told = f"{name} {value:g} ({why})"
        return self._moved(name, replace(self.levers, **{name: lever.to(value, now)}), told, why)

    def _moved(self, name: str, levers: Levers, told: str, why: str) -> Outlook:
        return replace(self, levers=levers, reason=told, why={**self.why, name: why})


def _may(lever: Lever, value: float, now: float, dwell_s: float) -> bool:
    """Whether a lever may go there. Steps the same way keep the dwell time as well."""
    return value != lever.value and now - lever.moved_s >= dwell_s


def look(facts: Facts, before: Outlook | None, half_lives_s: tuple[float, float], now: float) -> Outlook:
    """A group after its newest report.

    Args:
        half_lives_s: of what it needed of its host, and of its device.
    """
    if before is None:
        before = Outlook(facts, Levers(Lever(facts.limit)), 0.0, now)
    passed_s = max(0.0, now - before.seen_s)
    num_there = facts.num_running + facts.num_parked
    size = (facts.kv + facts.held) / num_there if num_there else 0.0
    size = size or before.sequence_bytes or facts.pool * _TYPICAL
    beyond_device = facts.num_open * size - _USABLE * facts.pool
    fade, pool_fade = (0.5 ** (passed_s / half_life_s) for half_life_s in half_lives_s)
    needed = max(facts.held, beyond_device, min(before.need, before.levers.size.value) * fade)
    return Outlook(  # not `replace`, which takes three times as long, once for each group of the cluster
        facts,
        before.levers,
        needed,
        now,
        _pool_need(facts, before, size, pool_fade),
        size,
        before.first.then(before.facts.first, facts.first, passed_s),
        before.pace.then(before.facts.paced, facts.paced, passed_s),
        before.pace_late_since,
        before.reason,
        before.why,
    )


def _pool_need(facts: Facts, before: Outlook, sequence_bytes: float, fade: float) -> float:
    """Of a device: room for the KV of all open requests, those that wait too; more where that does not do."""
    if not facts.device:
        return 0.0
    needed = facts.num_open * sequence_bytes / _USABLE
    is_late = facts.num_waiting_late > 0 or before.first.share < _KEPT
    if is_late and facts.kv >= _FULL * facts.pool:
        needed = max(needed, facts.pool * _STEP)
    return max(facts.pool_floor, facts.kv, needed, min(before.pool_need, before.facts.pool_limit) * fade)
