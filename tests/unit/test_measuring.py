"""What `--calibrate` finds of an engine whose times are known."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.calibration import Calibration, StepRates
from engine.config import MIB, EngineConfig, MemoryConfig, ModelSource, SchedulerConfig
from engine.core import Engine
from engine.measuring import Gauge
from engine.messages import TokenDelta
from engine.simulated import VirtualClock
from engine.simulation import SimulatedEngine, read_shape
from engine.step_times import StepWork
from tests.bench.swinging_load import TINY_LLAMA


@dataclass
class _Known:
    """An engine in virtual time, `slowness` times as slow as its rates, and its gauge."""

    slowness: float
    folder: Path

    def gauge(self) -> Gauge:
        (self.folder / "config.json").write_text(json.dumps(TINY_LLAMA))
        config = EngineConfig(
            ModelSource("tiny", str(self.folder)),
            MemoryConfig(pool_bytes=64 * MIB),
            SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=256),
        )
        shape, clock = read_shape(config), VirtualClock()

        def build(config: EngineConfig, publish: Callable[[Sequence[TokenDelta]], None], _: object) -> Engine:
            return SimulatedEngine(config, shape, self.calibration, publish, clock=clock).engine

        return Gauge(config, shape.geometry, build, clock)

    @property
    def calibration(self) -> Calibration:
        slow = self.slowness
        return Calibration(StepRates(0.01 * slow, 1e-4 * slow, 1e-6 * slow, 1e-7 * slow), 1e9, 0.0, 2.0)


@pytest.fixture
def known(tmp_path: Path) -> _Known:
    return _Known(1.0, tmp_path)


def test_points_are_those_of_the_engine(known: _Known) -> None:
    found = known.gauge().figures(lambda text: None)
    steps = known.calibration.steps
    assert {1, 8} <= {point["batch"] for point in found["decode"]}
    assert len({point["context"] for point in found["decode"] if point["batch"] == 1}) == 2
    for point in found["decode"]:
        work = StepWork(0, point["batch"], point["batch"] * point["context"], 0.0)
        assert point["seconds"] == pytest.approx(steps.step_s(work), rel=0.02)
    assert any(point["context"] for point in found["prefill"])
    for point in found["prefill"]:
        tokens, context = point["tokens"], point["context"]
        if tokens <= 256:  # in one step
            work = StepWork(tokens, 0, 0, tokens * (context + tokens / 2))
            assert point["seconds"] == pytest.approx(steps.step_s(work), rel=0.02)


def test_a_slow_engine_is_measured_in_bounded_time_and_says_so(known: _Known) -> None:
    known.slowness = 60.0
    gauge, told = known.gauge(), list[str]()
    found = gauge.figures(told.append)
    assert found["prefill"]
    assert found["decode"]
    assert told[-1].endswith("points are left out, after 60 s")
    assert told[0].startswith("1/")
