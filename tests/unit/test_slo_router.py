"""The router inside Ray Serve's own routing tasks; only the groups are fakes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
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

from cluster.early_choice import begin_early
from cluster.request_courier import Handover
from cluster.router import CHOSEN_S, SloRouter
from engine.messages import GenerateRequest
from engine.request_wire import EngineAddress

DEPLOYMENT = DeploymentID("group", "app")


@dataclass
class FakeGroup:
    replica_id: ReplicaID
    routing_stats: dict[str, Any] = field(
        default_factory=lambda: {"num_open": 0, "token_s": 1e-3, "ttft_slo_s": 2.0, "beat_s": 0.0}
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
        self.router = SloRouter(DEPLOYMENT, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True)
        self.router.initialize_state(clock=lambda: self.now_s)

    @property
    def names(self) -> list[ReplicaID]:
        return [group.replica_id for group in self.groups]

    async def start(self) -> None:
        self.router.update_replicas(self.groups)  # type: ignore[arg-type]
        await asyncio.sleep(0)  # Serve asks new groups for their queues in a task of its own

    async def choose(
        self, prompt: Sequence[int] | None = None, session_id: str = "", salt: str = "", name: str = ""
    ) -> ReplicaID:
        """The group of a request; without a prompt, of a call that carries none."""
        self.num_chosen += 1
        name = name or f"request{self.num_chosen}"
        metadata = RequestMetadata(request_id=name, internal_request_id=name)
        args = []
        if prompt is not None:
            args = [GenerateRequest(name, tuple(prompt), cache_salt=salt, session_id=session_id)]
        chosen = await self.router._choose_replica_for_request(PendingRequest(args, {}, metadata))
        return chosen.replica_id

    async def serve(self, prompt: Sequence[int], **identity: str) -> ReplicaID:
        """The same, sent and ended."""
        group = await self.choose(prompt, **identity)
        self.router.on_send_request(group)
        self.router.on_request_completed(group, f"request{self.num_chosen}")
        self.router.on_new_queue_len_info(group, 0)
        return group

    def push(self, group: ReplicaID, **facts: float) -> None:
        """A group tells its facts, and the others that they are there."""
        self.now_s += 0.5
        for one in self.groups:
            news = facts if one.replica_id == group else {}
            beat = one.routing_stats["beat_s"] + 1.0
            one.routing_stats = one.routing_stats | news | {"beat_s": beat}
        self.router.update_replicas(self.groups)  # type: ignore[arg-type]


def in_two_groups(scenario: Callable[[Cluster], Coroutine[Any, Any, None]], num_groups: int = 2) -> None:
    """Run a scenario in a cluster of two idle groups, or of more."""

    async def started() -> None:
        cluster = Cluster(num_groups)
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


def test_each_request_of_a_burst_gets_the_group_that_was_chosen_for_it() -> None:
    """Conversations that were served before come back at once: each is at home, whatever is in flight."""

    async def scenario(cluster: Cluster) -> None:
        talks = [range(1000 * at, 1000 * at + 640) for at in range(1, 9)]
        homes = [await cluster.serve(talk) for talk in talks]
        assert len(set(homes)) > 1
        again = await asyncio.gather(*(cluster.choose([*talk, *range(99)]) for talk in talks))
        assert again == homes

    in_two_groups(scenario, 4)


def test_the_choices_of_one_http_request_all_find_a_group() -> None:
    """To Ray Serve all calls that one of them makes are one request: they have the same internal id."""

    async def scenario(cluster: Cluster) -> None:
        prompts = [tuple(range(start, start + 300)) for start in range(0, 4000, 1000)]
        homes = [await cluster.serve(prompt) for prompt in prompts]
        assert len(set(homes)) > 1
        together = [cluster.choose(prompt, name="one-http-request") for prompt in prompts]
        assert await asyncio.wait_for(asyncio.gather(*together), 10) == homes

    in_two_groups(scenario)


def test_a_conversation_returns_until_its_groups_queue_costs_more_than_its_prompt() -> None:
    async def scenario(cluster: Cluster) -> None:
        talk = list(range(5000, 6024))
        home = await cluster.serve(talk)
        other = next(name for name in cluster.names if name != home)
        for turn in range(5):
            talk += range(7000 + 100 * turn, 7100 + 100 * turn)
            assert await cluster.serve(talk) == home
        cluster.push(home, wait_s=0.9)  # 1,024 tokens and more are cached, at 1 ms each
        assert await cluster.serve(talk) == home
        cluster.push(home, wait_s=1.9)
        assert await cluster.serve(talk) == other
        cluster.push(home, wait_s=0.0)
        cluster.push(other, wait_s=1.9)
        assert await cluster.serve(talk) == home, "its cache is still there"

    in_two_groups(scenario)


def test_prompts_of_another_salt_share_nothing() -> None:
    async def scenario(cluster: Cluster) -> None:
        talk = list(range(5000, 6024))
        home = await cluster.serve(talk, salt="a")
        cluster.push(home, wait_s=0.5)
        assert await cluster.serve(talk, salt="a") == home
        assert await cluster.serve(talk, salt="b") != home

    in_two_groups(scenario)


def test_a_session_has_the_same_home_for_every_router() -> None:
    """Two ingress replicas, which know nothing of one another."""

    async def scenario(cluster: Cluster) -> None:
        another = Cluster(8)
        await another.start()
        homes = set()
        for number in range(20):
            prompt = list(range(1000 * number, 1000 * number + 500))
            first = await cluster.serve(prompt, session_id=f"s{number}")
            later = await another.serve([*prompt, *range(300)], session_id=f"s{number}")
            assert first == later
            homes.add(first)
        assert len(homes) >= 5, "sessions are spread"

    in_two_groups(scenario, 8)


def test_the_controllers_weight_sends_fewer_requests() -> None:
    async def scenario(cluster: Cluster) -> None:
        one, other = cluster.names
        cluster.push(one, weight=0.25)
        chosen = Counter([await cluster.choose() for _ in range(50)])
        assert 0 < chosen[one] < chosen[other] / 2

    in_two_groups(scenario)


class RecordingHandover(Handover):
    """Notes what the router tells it."""

    def __init__(self, is_reached: bool = True) -> None:
        self.told: list[EngineAddress | str] = []
        self._early = None
        self._is_reached = is_reached

    @property
    def is_under_way(self) -> bool:
        return self._is_reached and self.told[-1:] not in ([], ["refused"])

    def send_to(self, door: EngineAddress) -> None:
        self.told.append(door)

    def recall(self) -> None:
        self.told.append("refused")

    async def pause(self) -> None:
        pass


def test_a_request_is_told_which_group_it_gets_and_when_that_has_refused() -> None:
    async def scenario(cluster: Cluster) -> None:
        doors = [EngineAddress(f"tcp://127.0.0.1:{port}", b"secret") for port in (1, 2)]
        for group, door in zip(cluster.groups, doors, strict=True):
            group.routing_stats["door"] = (door.address, door.secret.hex())
        cluster.router.update_replicas(cluster.groups)  # type: ignore[arg-type]
        metadata = RequestMetadata(request_id="r", internal_request_id="r")
        handover = RecordingHandover()
        pending = PendingRequest([GenerateRequest("r", (1,)), handover], {}, metadata)
        chosen = await cluster.router._choose_replica_for_request(pending)
        assert [one for one in handover.told if one != "refused"] == [
            doors[cluster.names.index(chosen.replica_id)]
        ]
        handover.told.clear()
        again = await cluster.router._choose_replica_for_request(pending, is_retry=True)
        door = doors[cluster.names.index(again.replica_id)]
        assert handover.told[-1] == door
        assert "refused" in handover.told[:-1]

    in_two_groups(scenario)


class EarlyBird:
    """A request that may begin before Serve is asked, in a cluster whose groups have doors."""

    def __init__(self, cluster: Cluster, is_reached: bool = True) -> None:
        self._cluster = cluster
        self.handover = RecordingHandover(is_reached)
        metadata = RequestMetadata(request_id="r", internal_request_id="r")
        self.request = GenerateRequest("r", tuple(range(500)))
        self.pending = PendingRequest([self.request, self.handover], {}, metadata)

    def begin(self) -> bool:
        return begin_early(DEPLOYMENT.app_name, DEPLOYMENT.name, self.request, self.handover)

    async def call(self, is_retry: bool = False) -> ReplicaID:
        """Where Serve sends the call."""
        chosen = await self._cluster.router._choose_replica_for_request(self.pending, is_retry=is_retry)
        return chosen.replica_id


async def with_doors(cluster: Cluster) -> dict[EngineAddress, ReplicaID]:
    """Whose each door is, once the router has been asked for a group."""
    doors = {EngineAddress(f"tcp://127.0.0.1:{at}", b"s"): one for at, one in enumerate(cluster.names, 1)}
    for door, group in zip(doors, cluster.groups, strict=True):
        group.routing_stats["door"] = (door.address, door.secret.hex())
    cluster.router.update_replicas(cluster.groups)  # type: ignore[arg-type]
    await cluster.serve(range(3))
    return doors


def test_a_request_that_began_early_gets_its_call_there() -> None:
    async def scenario(cluster: Cluster) -> None:
        doors, bird = await with_doors(cluster), EarlyBird(cluster)
        assert bird.begin()
        group = doors[bird.handover.told[0]]  # type: ignore[index]
        assert cluster.router._in_flight.counts(cluster.now_s)[group] == 1
        cluster.push(group, wait_s=30.0, pressure=1.0)  # any other group would be better now
        assert await bird.call() == group
        assert cluster.router._in_flight.counts(cluster.now_s)[group] == 1, "counted once"
        assert "refused" not in bird.handover.told
        cluster.router.on_send_request(group)
        assert cluster.router._in_flight.counts(cluster.now_s)[group] == 1
        await bird.call(is_retry=True)
        assert "refused" in bird.handover.told

    in_two_groups(scenario)


def test_those_that_begin_early_are_spread() -> None:
    async def scenario(cluster: Cluster) -> None:
        doors = await with_doors(cluster)
        birds = [EarlyBird(cluster) for _ in range(6)]
        assert all(bird.begin() for bird in birds)
        assert len({doors[bird.handover.told[0]] for bird in birds}) == 2  # type: ignore[index]

    in_two_groups(scenario)


def test_a_request_waits_for_serve_where_no_group_can_begin_it() -> None:
    async def scenario(cluster: Cluster) -> None:
        assert not EarlyBird(cluster).begin(), "the router's event loop is not known"
        await cluster.serve(range(3))
        assert not EarlyBird(cluster).begin(), "no group has a door"
        await with_doors(cluster)
        assert not EarlyBird(cluster, is_reached=False).begin()
        for group in cluster.groups:
            group.max_ongoing_requests = 0
        assert not EarlyBird(cluster).begin(), "all are full"
        assert not cluster.router._in_flight.counts(cluster.now_s).total()

    in_two_groups(scenario)


def test_an_early_choice_that_is_given_up_does_not_count() -> None:
    async def scenario(cluster: Cluster) -> None:
        await with_doors(cluster)
        bird = EarlyBird(cluster)
        assert bird.begin()
        bird.handover.take_early()
        assert not cluster.router._in_flight.counts(cluster.now_s).total()

    in_two_groups(scenario)


def test_a_group_that_is_gone_does_not_get_the_call() -> None:
    async def scenario(cluster: Cluster) -> None:
        doors, bird = await with_doors(cluster), EarlyBird(cluster)
        assert bird.begin()
        gone = doors[bird.handover.told[0]]  # type: ignore[index]
        cluster.groups = [group for group in cluster.groups if group.replica_id != gone]
        cluster.router.update_replicas(cluster.groups)  # type: ignore[arg-type]
        assert await bird.call() == cluster.names[0]
        assert bird.handover.told[1] == "refused"

    in_two_groups(scenario)
