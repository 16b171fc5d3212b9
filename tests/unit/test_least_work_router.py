"""The router inside Ray Serve's own routing tasks; only the groups are fakes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    ReplicaID,
    RequestMetadata,
)
from ray.serve.request_router import PendingRequest

from cluster.router import CHOSEN_S, LeastWorkRouter

DEPLOYMENT = DeploymentID("group", "app")


@dataclass
class FakeGroup:
    replica_id: ReplicaID
    routing_stats: dict[str, Any] = field(
        default_factory=lambda: {"num_running": 0, "num_waiting": 0, "kv_usage": 0.0}
    )
    max_ongoing_requests: int = 100

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return 0


class Cluster:
    """A router over `num_groups` idle groups, on a clock that the test moves."""

    def __init__(self, num_groups: int) -> None:
        self.now_s = 1000.0
        self.num_chosen = 0
        self.groups = [FakeGroup(ReplicaID(f"group{index}", DEPLOYMENT)) for index in range(num_groups)]
        self.router = LeastWorkRouter(
            DEPLOYMENT, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True
        )
        self.router.initialize_state(clock=lambda: self.now_s)

    @property
    def names(self) -> list[ReplicaID]:
        return [group.replica_id for group in self.groups]

    async def start(self) -> None:
        self.router.update_replicas(self.groups)  # type: ignore[arg-type]
        await asyncio.sleep(0)  # Serve asks new groups for their queues in a task of its own

    async def choose(self) -> ReplicaID:
        self.num_chosen += 1
        name = f"request{self.num_chosen}"
        metadata = RequestMetadata(request_id=name, internal_request_id=name)
        chosen = await self.router._choose_replica_for_request(PendingRequest([], {}, metadata))
        return chosen.replica_id


def in_two_groups(scenario: Callable[[Cluster], Coroutine[Any, Any, None]]) -> None:
    """Run a scenario in a cluster of two idle groups."""

    async def started() -> None:
        cluster = Cluster(2)
        await cluster.start()
        await scenario(cluster)

    asyncio.run(started())


@pytest.mark.parametrize("num_requests", [2, 6, 16])
def test_requests_that_come_together_are_spread(num_requests: int) -> None:
    """Serve counts a request when it is sent: all of a burst are chosen for before any of it is."""

    async def scenario(cluster: Cluster) -> None:
        chosen = Counter(await asyncio.gather(*(cluster.choose() for _ in range(num_requests))))
        assert set(chosen.values()) == {num_requests // 2}

    in_two_groups(scenario)


def test_an_answer_to_an_older_request_does_not_hide_the_newer() -> None:
    """Serve overwrites its count with what the group saw when the older request came in."""

    async def scenario(cluster: Cluster) -> None:
        one, other = cluster.names
        for group in (one, one, one, other, other):
            cluster.router.on_send_request(group)
        cluster.router.on_new_queue_len_info(one, 1)
        assert await cluster.choose() == other

    in_two_groups(scenario)


def test_finished_requests_leave_the_count() -> None:
    async def scenario(cluster: Cluster) -> None:
        one, other = cluster.names
        for group in (one, one, one, other):
            cluster.router.on_send_request(group)
        for number in range(3):
            cluster.router.on_request_completed(one, str(number))
            cluster.router.decrement_queue_len_cache(one)
        assert await cluster.choose() == one

    in_two_groups(scenario)


def test_a_choice_that_was_never_sent_is_forgotten() -> None:
    async def scenario(cluster: Cluster) -> None:
        one = await cluster.choose()  # its client left before Serve could send it
        other = await cluster.choose()
        assert one != other
        cluster.router.on_send_request(other)
        cluster.now_s += 2 * CHOSEN_S
        assert await cluster.choose() == one

    in_two_groups(scenario)


def test_a_group_that_went_away_leaves_nothing() -> None:
    async def scenario(cluster: Cluster) -> None:
        gone = cluster.groups.pop(0).replica_id
        cluster.router.on_send_request(gone)
        await cluster.start()
        cluster.router.on_request_completed(gone, "late")
        (left,) = cluster.names
        assert await cluster.choose() == left
        await cluster.start()
        assert set(cluster.router._in_flight._num_sent) == {left}

    in_two_groups(scenario)
