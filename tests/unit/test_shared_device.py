"""Two models on one device: real engines, the real controller, and a device that has no more than it has.

The pattern model checks every key and value that it reads, so a chunk that two engines, or two sequences,
believed to be theirs would be seen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from cluster.controller import Controller
from cluster.controller_metrics import ControllerMetrics
from cluster.policy import PolicyConfig
from cluster.reports import GroupReport, Instruction, InstructionAnswer
from engine.config import MemoryConfig, SchedulerConfig
from engine.control import HostSnapshot
from engine.memory.host_vmm import HostVirtualMemory
from engine.messages import GenerateRequest
from engine.simulated import VirtualClock
from tests.fakes import CHUNK_BYTES, Bench
from tests.shared_memory import OneDevice
from tests.unit.engine_cases import ask, expect
from tests.unit.samples import RecordingBackend

OWN = 60  # chunks of each model at its start
STEPS_A_TICK = 12
HOST = HostSnapshot("node", 1 << 30, 1 << 30)


class Model:
    """One group of a model of its own. Implements `cluster.controller.Groups`."""

    def __init__(self, name: str, device: OneDevice) -> None:
        self.name = name
        vm = HostVirtualMemory(CHUNK_BYTES, device.num_chunks, use_native=False)
        device.add(vm)
        limits = SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=64)
        self.bench = Bench(OWN, MemoryConfig(), limits, vm=vm, shared_device="GPU-0")
        self.asked: list[GenerateRequest] = []
        self.limits: list[int] = []
        self.wanted = 0

    def ask(self, count: int) -> None:
        for _ in range(count):
            request = ask(f"{self.name}{len(self.asked)}", 40, 20)
            self.asked.append(request)
            self.bench.engine.submit(request)

    async def look(self) -> Sequence[GroupReport]:
        now = replace(self.bench.engine.snapshot, host=HOST)
        return [GroupReport(self.name, self.name, 1, 2.0, now, self.wanted)]

    async def instruct(self, instructions: Sequence[Instruction]) -> Sequence[InstructionAnswer]:
        (one,) = instructions
        self.wanted = one.wanted_replicas
        future = self.bench.engine.apply(one.order)
        self.bench.engine.step()
        if one.order.pool_bytes is not None:
            self.limits.append(one.order.pool_bytes // CHUNK_BYTES)
        return [InstructionAnswer(one.group_id, future.result(timeout=20))]

    @property
    def limit(self) -> int:
        return self.bench.engine.snapshot.memory.limit

    @property
    def num_open(self) -> int:
        return len(self.bench.scheduler.unfinished())


class Pair:
    """Both models on the device, and a controller whose seconds are `STEPS_A_TICK` steps each."""

    def __init__(self, policy: PolicyConfig | None = PolicyConfig()) -> None:  # noqa: B008 - frozen
        self.device = OneDevice(2 * OWN)
        self.a, self.b = Model("a", self.device), Model("b", self.device)
        self.clock = VirtualClock()
        self.backend = RecordingBackend()
        models = {"a": self.a, "b": self.b}
        self.controller = Controller(models, 1.0, ControllerMetrics(self.backend), policy, self.clock)

    def second(self) -> None:
        for _ in range(STEPS_A_TICK):
            for model in (self.a, self.b):
                model.bench.clock.now = max(model.bench.clock.now, self.clock())
                model.bench.engine.step()
                model.bench.pool.check()
            made = self.a.bench.pool.chunks.num_created + self.b.bench.pool.chunks.num_created
            assert made == self.device.num_made <= self.device.num_chunks
        self.clock.advance(1.0)
        asyncio.run(self.controller.tick())
        assert self.a.limit + self.b.limit <= self.device.num_chunks

    def seconds_until(self, model: Model, chunks: int, at_most: int = 30) -> int:
        """Seconds until a model may have so many chunks, and its queue is kept long enough to use them."""
        for count in range(at_most):
            if model.limit >= chunks:
                return count
            model.ask(max(0, 24 - model.num_open))
            self.second()
        raise AssertionError(f"{model.name} has {model.limit} of {chunks} chunks")

    def finish(self) -> None:
        for _ in range(200):
            if not self.a.num_open + self.b.num_open:
                return
            self.second()
        raise AssertionError("not done")


@pytest.fixture(scope="module")
def swung() -> tuple[Pair, list[int]]:
    """The load went from a to b and back; how many seconds memory took to follow, each time."""
    pair = Pair()
    pair.second()
    taken = [pair.seconds_until(model, int(1.5 * OWN)) for model in (pair.a, pair.b, pair.a)]
    pair.finish()
    return pair, taken


def test_memory_follows_the_load_within_seconds_and_comes_back(swung: tuple[Pair, list[int]]) -> None:
    pair, taken = swung
    assert max(taken) <= 10, taken
    assert max(pair.a.limits) > 1.5 * OWN < max(pair.b.limits)
    assert min(pair.a.limits) < 0.5 * OWN > min(pair.b.limits)


def test_no_request_is_lost_and_each_has_its_own_answer(swung: tuple[Pair, list[int]]) -> None:
    pair, _ = swung
    for model in (pair.a, pair.b):
        assert len(model.asked) > 16
        for request in model.asked:
            expect(model.bench, request)
        model.bench.assert_idle()


def test_the_device_is_never_promised_twice(swung: tuple[Pair, list[int]]) -> None:
    """The joint total is checked after every step; nobody even asked the device for more."""
    pair, _ = swung
    assert pair.device.most > 1.5 * OWN
    assert pair.device.num_refused == 0


def test_what_was_decided_is_told(swung: tuple[Pair, list[int]]) -> None:
    pair, _ = swung
    order = pair.a.bench.engine.snapshot.order
    assert order is not None
    assert pair.backend.total("ballonet_controller_decisions") >= 4
    assert pair.controller.latest().epoch == 1


def test_when_nobody_needs_it_each_has_its_own_part_again(swung: tuple[Pair, list[int]]) -> None:
    pair, _ = swung
    for _ in range(40):
        pair.second()
    for model in (pair.a, pair.b):
        assert abs(model.limit - OWN) <= 0.25 * OWN
    orders = len(pair.a.limits)
    for _ in range(20):
        pair.second()
    assert len(pair.a.limits) == orders, "at rest"


def test_a_group_alone_on_its_device_gets_no_limit() -> None:
    pair = Pair()
    pair.b.bench.engine.info = replace(pair.b.bench.engine.info, shared_device="GPU-1")
    pair.a.ask(8)
    for _ in range(5):
        pair.second()
    assert pair.a.limits == pair.b.limits == []
    order = pair.a.bench.engine.snapshot.order
    assert order is not None
    assert order.pool_bytes is None


def test_a_request_as_long_as_a_models_own_part_gets_it_back_while_the_other_is_busy() -> None:
    pair = Pair()
    pair.second()
    pair.seconds_until(pair.a, int(1.6 * OWN))
    long = ask("long", 200, 56)
    pair.b.asked.append(long)
    pair.b.bench.engine.submit(long)
    assert pair.b.limit < pair.b.bench.pool.chunks_for(256)
    for _ in range(15):
        pair.a.ask(max(0, 24 - pair.a.num_open))
        pair.second()
    expect(pair.b.bench, long)
    assert pair.a.num_open > 10
    assert max(pair.b.limits) >= pair.b.bench.pool.chunks_for(256)
    pair.finish()
    for model in (pair.a, pair.b):
        for request in model.asked:
            expect(model.bench, request)


def test_a_new_controller_leaves_limits_where_they_are() -> None:
    pair = Pair()
    pair.second()
    pair.seconds_until(pair.a, int(1.5 * OWN))
    limits = pair.a.limit, pair.b.limit
    again = Controller(
        {"a": pair.a, "b": pair.b},
        1.0,
        ControllerMetrics(RecordingBackend()),
        PolicyConfig(),
        VirtualClock(9.0),
    )
    asyncio.run(again.tick())
    assert (pair.a.limit, pair.b.limit) == limits
    assert again.latest().epoch == 2
    pair.controller = again
    pair.finish()
