"""Which TP group gets a request: a pure ranking, and the thin Ray Serve router around it.

The ranking needs numbers alone. The router collects them: queue lengths that Serve keeps, and the
facts each group pushes about once a second (`TpGroup.record_routing_stats`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

STALE_S = 5.0  # several periods of the push: older facts say nothing about now


@dataclass(frozen=True, slots=True)
class GroupLoad:
    """What is known of one group.

    Attributes:
        queue_len: requests this router believes to be there; None when it does not know.
        num_running, num_waiting: as the group pushed them; None when they are missing.
        kv_usage: share of the group's chunks that hold KV, 0 to 1.
        age_s: seconds since the pushed facts last changed.
    """

    queue_len: int | None
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
    pair = sorted(order[:2], key=lambda index: loads[index].queue_len or 0)
    return pair + order[2:]


def _work(load: GroupLoad) -> tuple[int, int, float]:
    running, waiting = load.num_running or 0, load.num_waiting or 0
    return max(load.queue_len or 0, running + waiting), waiting, load.kv_usage


class LeastWorkRouter(FIFOMixin, RequestRouter):
    """Ray Serve's plug for `rank_groups`."""

    def initialize_state(self, **kwargs: object) -> None:
        """Called by Serve once."""
        self._rng = random.Random()
        self._changed_s: dict[ReplicaID, float] = {}
        self._last_stats: dict[ReplicaID, object] = {}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Notes when each group's facts changed, on this process' clock: clocks of nodes differ."""
        super().update_replicas(replicas)
        now = time.monotonic()
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
        loads = [self._load(replica) for replica in candidate_replicas]
        return [[candidate_replicas[index]] for index in rank_groups(loads, self._rng)]

    def _load(self, replica: RunningReplica) -> GroupLoad:
        stats = replica.routing_stats
        changed_s = self._changed_s.get(replica.replica_id)
        return GroupLoad(
            queue_len=self.replica_queue_len_cache.get(replica.replica_id),
            num_running=stats.get("num_running"),
            num_waiting=stats.get("num_waiting"),
            kv_usage=stats.get("kv_usage", 0.0),
            age_s=float("inf") if changed_s is None else time.monotonic() - changed_s,
        )
