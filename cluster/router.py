"""Which TP group gets a request: a pure ranking, and the thin Ray Serve router around it.

The ranking needs numbers alone. The router collects them: queue lengths that Serve keeps, and the
facts each group pushes about once a second (`TpGroup.record_routing_stats`).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

STALE_S = 5.0  # several periods of the push: older facts say nothing about now
CHOSEN_S = 1.0  # sending follows a choice within milliseconds; after this it was not sent at all


@dataclass(frozen=True, slots=True)
class GroupLoad:
    """What is known of one group.

    Attributes:
        queue_len: requests this router believes to be there, those on their way included.
        num_running, num_waiting: as the group pushed them; None when they are missing.
        kv_usage: share of the group's chunks that hold KV of live sequences, 0 to 1.
        age_s: seconds since the pushed facts last changed.
    """

    queue_len: int
    num_running: int | None = None
    num_waiting: int | None = None
    kv_usage: float = 0.0
    age_s: float = float("inf")

    @property
    def is_fresh(self) -> bool:
        """Whether the pushed facts can be trusted."""
        return self.num_running is not None and self.num_waiting is not None and self.age_s <= STALE_S


def rank_groups(loads: Sequence[GroupLoad], rng: random.Random) -> list[int]:
    """Indices of `loads`, best first.

    With fresh facts of all groups: least outstanding requests, then fewest waiting ones, then most
    free memory; equals in random order. A request that this router has sent but the group has not
    reported yet counts through `queue_len`. Otherwise power of two choices on `queue_len`, so that
    several routers with the same old view do not all pick the same group.
    """
    order = list(range(len(loads)))
    rng.shuffle(order)
    if all(load.is_fresh for load in loads):
        return sorted(order, key=lambda index: _work(loads[index]))
    pair = sorted(order[:2], key=lambda index: loads[index].queue_len)
    return pair + order[2:]


def _work(load: GroupLoad) -> tuple[int, int, float]:
    running, waiting = load.num_running or 0, load.num_waiting or 0
    return max(load.queue_len, running + waiting), waiting, load.kv_usage


class InFlight:
    """One router's own count per group: requests chosen for it, or sent and not finished.

    Serve's count starts when a request is sent, after every request of a burst has been chosen for,
    and is overwritten by what the group saw when an older request arrived: of six requests at once
    one group got five.
    """

    def __init__(self) -> None:
        self._num_sent: Counter[ReplicaID] = Counter()
        self._chosen: dict[asyncio.Future[RunningReplica], tuple[ReplicaID, float]] = {}

    def choose(self, request: asyncio.Future[RunningReplica], group: ReplicaID, now_s: float) -> None:
        """`group` came first for a request; Serve sets its future to the group that it gets."""
        self._chosen[request] = (group, now_s)

    def send(self, group: ReplicaID) -> None:
        """A request went to the group."""
        self._num_sent[group] += 1
        for request in self._chosen:
            if request.done() and self._target(request) == group:
                del self._chosen[request]
                return

    def complete(self, group: ReplicaID) -> None:
        """A sent request ended, in whatever way."""
        self._num_sent[group] = max(0, self._num_sent[group] - 1)

    def keep_only(self, groups: Iterable[ReplicaID]) -> None:
        """Forgets all other groups."""
        self._num_sent = Counter({group: self._num_sent[group] for group in groups})

    def counts(self, now_s: float) -> Counter[ReplicaID]:
        """Requests of this router at each group; forgets choices that were not sent."""
        self._chosen = {
            request: (group, chosen_s)
            for request, (group, chosen_s) in self._chosen.items()
            if now_s - chosen_s <= CHOSEN_S and not request.cancelled()
        }
        return self._num_sent + Counter(map(self._target, self._chosen))

    def _target(self, request: asyncio.Future[RunningReplica]) -> ReplicaID | None:
        """Serve gives what one routing task chose to the oldest request, whichever that task had."""
        if not request.done():
            return self._chosen[request][0]
        return None if request.cancelled() else request.result().replica_id


class LeastWorkRouter(FIFOMixin, RequestRouter):
    """Ray Serve's plug for `rank_groups`."""

    def initialize_state(self, clock: Callable[[], float] = time.monotonic, **kwargs: object) -> None:
        """Called by Serve once; `clock` gives seconds."""
        self._clock = clock
        self._rng = random.Random()
        self._in_flight = InFlight()
        self._changed_s: dict[ReplicaID, float] = {}
        self._last_stats: dict[ReplicaID, object] = {}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Notes when each group's facts changed, on this process' clock: clocks of nodes differ."""
        super().update_replicas(replicas)
        now = self._clock()
        self._in_flight.keep_only(replica.replica_id for replica in replicas)
        self._changed_s = {
            replica.replica_id: now
            if self._last_stats.get(replica.replica_id) != replica.routing_stats
            else self._changed_s.get(replica.replica_id, now)
            for replica in replicas
        }
        self._last_stats = {replica.replica_id: dict(replica.routing_stats) for replica in replicas}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """All candidates, one per rank, best first; Serve takes the first that has room."""
        if pending_request is not None:
            # Else Serve asks again without a pause while every group is full.
            pending_request.routing_context.should_backoff = True
        now = self._clock()
        counts = self._in_flight.counts(now)
        loads = [self._load(replica, counts[replica.replica_id], now) for replica in candidate_replicas]
        ranked = [candidate_replicas[index] for index in rank_groups(loads, self._rng)]
        if ranked and pending_request is not None:
            self._in_flight.choose(pending_request.future, ranked[0].replica_id, now)
        return [[replica] for replica in ranked]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Called by Serve for each request that it sends."""
        super().on_send_request(replica_id)
        self._in_flight.send(replica_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Serve once for each request that it sent, refused and failed ones included."""
        super().on_request_completed(replica_id, internal_request_id)
        self._in_flight.complete(replica_id)

    def _load(self, replica: RunningReplica, num_in_flight: int, now_s: float) -> GroupLoad:
        stats = replica.routing_stats
        changed_s = self._changed_s.get(replica.replica_id)
        return GroupLoad(
            queue_len=max(self.replica_queue_len_cache.get(replica.replica_id) or 0, num_in_flight),
            num_running=stats.get("num_running"),
            num_waiting=stats.get("num_waiting"),
            kv_usage=stats.get("kv_usage", 0.0),
            age_s=float("inf") if changed_s is None else now_s - changed_s,
        )
