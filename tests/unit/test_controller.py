"""The controller's loop: what it sees, and that nothing ends it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import pytest

from cluster.controller import ClusterView, Controller
from cluster.metrics import ControllerMetrics
from engine.messages import EngineSnapshot
from tests.unit.samples import RecordingBackend, snapshot


def _controller(
    looks: dict[str, Callable[[], Awaitable[list[EngineSnapshot]]]], tick_s: float = 0.001
) -> tuple[Controller, RecordingBackend]:
    backend = RecordingBackend()
    return Controller(looks, tick_s, ControllerMetrics(backend)), backend


async def _two() -> list[EngineSnapshot]:
    return [snapshot("a"), snapshot("a")]


async def _broken() -> list[EngineSnapshot]:
    raise RuntimeError("the cluster is upset")


def test_it_remembers_what_it_saw() -> None:
    controller, backend = _controller({"a": _two})
    assert controller.latest() == ClusterView(0.0, {})
    asyncio.run(controller.tick())
    assert [len(groups) for groups in controller.latest().groups.values()] == [2]
    assert controller.latest().taken_s > 0
    assert backend.last("ballonet_controller_groups") == 2


def test_a_model_that_fails_does_not_hide_the_others(caplog: pytest.LogCaptureFixture) -> None:
    controller, backend = _controller({"bad": _broken, "a": _two})
    with caplog.at_level(logging.ERROR, "ray.serve"):
        for _ in range(5):
            asyncio.run(controller.tick())
    assert list(controller.latest().groups) == ["a"]
    assert backend.total("ballonet_controller_tick_failures") == 5
    assert len([record for record in caplog.records if "could not look at bad" in record.message]) == 1


def test_the_loop_goes_on_after_failures_and_ends_when_cancelled() -> None:
    ticks = 0

    async def first_fails() -> list[EngineSnapshot]:
        nonlocal ticks
        ticks += 1
        if ticks == 1:
            raise RuntimeError("not yet")
        return [snapshot("a")]

    async def scenario() -> None:
        controller, _ = _controller({"a": first_fails})
        task = asyncio.create_task(controller.run())
        while not controller.latest().groups:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(scenario(), 5))
    assert ticks >= 2
