"""The controller's loop over real engines: what it sees and orders, and what its own death changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from cluster.controller import ClusterView, Controller
from cluster.controller_metrics import ControllerMetrics
from cluster.policy import PolicyConfig
from cluster.reports import GroupReport, Instruction, InstructionAnswer
from engine.config import MemoryConfig, SchedulerConfig
from engine.control import HostSnapshot, Order
from engine.memory.balloon import Balloon
from engine.simulated import NullSlabs, VirtualClock
from tests.fakes import CHUNK_BYTES, Bench
from tests.unit.samples import RecordingBackend, snapshot

SLAB, HALF = 8, 80
NODE = HostSnapshot("node", 1 << 30, 1 << 30)
POLICY = PolicyConfig(host_memory_bytes=2 * HALF * CHUNK_BYTES, dwell_s=5.0)


class RealGroups:
    """Groups of one model: real engines in this process. Implements `cluster.controller.Groups`.

    Attributes:
        are_away: whether nobody answers.
        demand: by group, requests that are said to wait beside those that do.
    """

    def __init__(self, *names: str, model_id: str = "a") -> None:
        self._model_id = model_id
        self.benches = {name: _engine() for name in names}
        self.demand = dict.fromkeys(names, 0)
        self.are_away = False
        self.wanted: dict[str, int] = {}
        self.answers: list[InstructionAnswer] = []

    async def look(self) -> Sequence[GroupReport]:
        if self.are_away:
            raise RuntimeError("the cluster is upset")
        reports = []
        for name, bench in self.benches.items():
            bench.engine.step()
            now = bench.engine.snapshot
            now = replace(now, host=NODE, num_waiting=now.num_waiting + self.demand[name])
            reports.append(GroupReport(name, self._model_id, 1, 2.0, now, self.wanted.get(name, 0)))
        return reports

    async def instruct(self, instructions: Sequence[Instruction]) -> Sequence[InstructionAnswer]:
        answers = []
        for one in instructions:
            self.wanted[one.group_id] = one.wanted_replicas
            future = self.benches[one.group_id].engine.apply(one.order)
            self.benches[one.group_id].engine.step()
            answers.append(InstructionAnswer(one.group_id, future.result(timeout=20)))
        self.answers += answers
        return answers

    @property
    def sizes(self) -> dict[str, int]:
        return {name: bench.balloon.num_logical for name, bench in self.benches.items()}

    @property
    def orders(self) -> dict[str, Order | None]:
        return {name: bench.engine.snapshot.order for name, bench in self.benches.items()}


def _engine() -> Bench:
    limits = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64)
    balloon = Balloon(NullSlabs(), CHUNK_BYTES, HALF, SLAB, lambda: 1 << 40)
    return Bench(46, MemoryConfig(), limits, balloon=balloon)


def _controller(
    groups: object, clock: Callable[[], float], policy: PolicyConfig | None = POLICY, tick_s: float = 0.001
) -> tuple[Controller, RecordingBackend]:
    backend = RecordingBackend()
    models = groups if isinstance(groups, dict) else {"a": groups}
    return Controller(models, tick_s, ControllerMetrics(backend), policy, clock), backend


def _tick(controller: Controller, clock: VirtualClock, times: int = 1) -> None:
    for _ in range(times):
        clock.advance(1.0)
        asyncio.run(controller.tick())


def test_it_remembers_what_it_saw_and_orders_nothing_without_a_policy() -> None:
    groups, clock = RealGroups("g1", "g2"), VirtualClock()
    controller, backend = _controller(groups, clock, policy=None)
    assert controller.latest() == ClusterView(0.0, {})
    _tick(controller, clock)
    assert [len(found) for found in controller.latest().groups.values()] == [2]
    assert controller.latest().taken_s > 0
    assert backend.last("ballonet_controller_groups") == 2
    assert groups.orders == {"g1": None, "g2": None}


def test_its_first_orders_leave_every_lever_where_it_is() -> None:
    groups, clock = RealGroups("g1", "g2"), VirtualClock()
    controller, backend = _controller(groups, clock)
    _tick(controller, clock, 30)
    assert groups.sizes == {"g1": HALF, "g2": HALF}
    assert {order and (order.epoch, order.levers) for order in groups.orders.values()} == {
        (1, (HALF * CHUNK_BYTES, HALF * CHUNK_BYTES, 1.0, 1.0, None))
    }
    assert [one.answer and one.answer.outcome for one in groups.answers] == ["applied", "applied"]
    assert backend.last("ballonet_controller_epoch") == 1
    assert backend.total("ballonet_controller_orders") == 2
    assert backend.values("ballonet_controller_decisions") == []
    assert controller.latest().replicas == {"a": 2}
    assert groups.wanted == {"g1": 2, "g2": 2}


def test_memory_goes_to_the_group_that_needs_it_and_is_never_promised_twice() -> None:
    groups, clock = RealGroups("g1", "g2"), VirtualClock()
    controller, backend = _controller(groups, clock)
    _tick(controller, clock, 3)
    groups.demand["g1"] = 60
    for _ in range(20):
        _tick(controller, clock)
        assert sum(groups.sizes.values()) <= 2 * HALF
    assert groups.sizes["g1"] > 1.7 * HALF
    assert 0 < groups.sizes["g2"] < HALF / 3
    order = groups.orders["g1"]
    assert order is not None
    assert "grow" in order.reason
    assert backend.total("ballonet_controller_decisions") >= 2


def test_a_new_incarnation_goes_on_where_the_old_one_was_killed() -> None:
    groups, clock = RealGroups("g1", "g2"), VirtualClock()
    controller, _ = _controller(groups, clock)
    groups.demand["g1"] = 60
    _tick(controller, clock, 20)
    sizes, levers = groups.sizes, {name: order and order.levers for name, order in groups.orders.items()}
    assert sizes["g1"] > sizes["g2"]
    del controller
    groups.demand["g1"] = 0  # while it is away nothing moves
    for bench in groups.benches.values():
        bench.run()
    assert groups.sizes == sizes
    groups.demand["g1"] = 60
    again, backend = _controller(groups, VirtualClock(7.0))
    _tick(again, clock)
    assert {order and order.epoch for order in groups.orders.values()} == {2}
    assert {name: order and order.levers for name, order in groups.orders.items()} == levers
    assert groups.sizes == sizes
    assert backend.values("ballonet_controller_decisions") == []


def test_a_controller_that_has_been_replaced_orders_nothing_more() -> None:
    groups, clock = RealGroups("g1", "g2"), VirtualClock()
    old, backend = _controller(groups, clock)
    _tick(old, clock)
    new, _ = _controller(groups, clock)
    _tick(new, clock)
    groups.demand["g1"] = 60
    _tick(old, clock)
    assert old.is_replaced
    assert backend.total("ballonet_controller_orders") >= 3
    assert {order and order.epoch for order in groups.orders.values()} == {2}
    asyncio.run(asyncio.wait_for(old.run(), 5))  # ends, so that Serve's health check fails


def test_a_group_that_was_away_at_the_start_is_not_beaten_by_its_older_orders() -> None:
    """It obeys epoch 5, which nobody else has heard of."""
    groups, clock = RealGroups("g1"), VirtualClock()
    sleeper = RealGroups("g2", model_id="b")
    asyncio.run(sleeper.look())
    order = Order(5, 1, HALF * CHUNK_BYTES, HALF * CHUNK_BYTES)
    asyncio.run(sleeper.instruct([Instruction("g2", order, 1)]))
    sleeper.are_away = True
    controller, _ = _controller({"a": groups, "b": sleeper}, clock)
    _tick(controller, clock)
    sleeper.are_away = False
    for _ in range(4):
        _tick(controller, clock)
    assert sleeper.orders["g2"] is not None
    assert sleeper.orders["g2"].epoch == 6
    assert not controller.is_replaced
    assert groups.orders["g1"] is not None
    assert groups.orders["g1"].epoch == 6


def test_a_model_that_fails_does_not_hide_the_others(caplog: pytest.LogCaptureFixture) -> None:
    bad, clock = RealGroups("g0"), VirtualClock()
    bad.are_away = True
    controller, backend = _controller({"bad": bad, "a": RealGroups("g1")}, clock)
    with caplog.at_level(logging.ERROR, "ray.serve"):
        _tick(controller, clock, 5)
    assert list(controller.latest().groups) == ["a"]
    assert backend.total("ballonet_controller_tick_failures") == 5
    assert len([record for record in caplog.records if "trouble with bad" in record.message]) == 1


def test_a_group_whose_engine_is_dead_keeps_its_memory_for_a_while() -> None:
    class HalfDead(RealGroups):
        async def look(self) -> Sequence[GroupReport]:
            reports = await super().look()
            if self.are_dead:
                return [reports[0], replace(reports[1], snapshot=None)]
            return reports

        are_dead = False

    groups, clock = HalfDead("g1", "g2"), VirtualClock()
    controller, _ = _controller(groups, clock)
    _tick(controller, clock, 12)
    groups.are_dead = True
    groups.demand["g1"] = 60
    _tick(controller, clock, 10)
    assert groups.sizes["g1"] <= 2 * HALF
    in_time = groups.sizes["g1"]
    _tick(controller, clock, int(POLICY.forget_s) + 5)
    assert groups.sizes["g1"] >= in_time
    assert groups.sizes["g1"] > 1.8 * HALF


def test_the_loop_goes_on_after_failures_and_ends_when_cancelled() -> None:
    class FailsOnce:
        num_looks = 0

        async def look(self) -> Sequence[GroupReport]:
            self.num_looks += 1
            if self.num_looks == 1:
                raise RuntimeError("not yet")
            return [GroupReport("g", "a", 1, 2.0, snapshot("a"))]

        async def instruct(self, instructions: Sequence[Instruction]) -> Sequence[InstructionAnswer]:
            raise RuntimeError("never")

    groups = FailsOnce()

    async def scenario() -> None:
        controller, _ = _controller({"a": groups}, VirtualClock())
        task = asyncio.create_task(controller.run())
        while not controller.latest().groups:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(scenario(), 20))
    assert groups.num_looks >= 2
