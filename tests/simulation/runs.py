"""Whole runs of the simulated engine: the settings of benchmarks in, the figures of benchmarks out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.bench.workload import Workload
from engine.calibration import Calibration
from engine.config import EngineConfig, ModelSource, SchedulerConfig
from tests.bench.engine_options import EngineOptions
from tests.bench.in_process import Driven, drive
from tests.bench.promises import figures_of, summary_of
from tests.simulation.world import GIB, H100_8B, SimulatedEngine

POOL_GIB = 61.7  # of an H100 beside Llama-3.1-8B
BALLOON_GIB = 60.0  # about half of a host of 128 GiB, which is the engine's default on a GPU


@dataclass(frozen=True, slots=True)
class Run:
    """A run that has ended.

    Attributes:
        figures: as `run_engine` writes those of a round.
        num_steps: the engine's.
    """

    driven: Driven
    figures: dict[str, Any]
    num_steps: int


def simulated_engine(
    options: EngineOptions,
    max_model_len: int = 131_072,
    device: Calibration = H100_8B,
    priority_of: Callable[[str], int] = lambda request_id: 0,
) -> SimulatedEngine:
    """The engine that `options` make of the benchmarks' configuration for Llama-3.1-8B on one H100."""
    limits = SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=8192)
    config = options.applied_to(EngineConfig(ModelSource("simulated", "nowhere"), scheduler=limits))
    memory = config.memory
    return SimulatedEngine(
        POOL_GIB if memory.pool_bytes is None else memory.pool_bytes / GIB,
        BALLOON_GIB if memory.balloon_bytes is None else memory.balloon_bytes / GIB,
        config.scheduler,
        config.slo,
        memory,
        config.max_model_len or max_model_len,
        device,
        priority_of,
    )


def simulate(
    options: EngineOptions,
    workload: Workload,
    submit_for_s: float = math.inf,
    device: Calibration = H100_8B,
    priority_of: Callable[[str], int] = lambda request_id: 0,
) -> Run:
    """Run a workload to its end, in virtual time.

    Args:
        submit_for_s: seconds after which nothing is submitted any more.
    """
    engine = simulated_engine(options, device=device, priority_of=priority_of)
    driven = drive(engine, workload, engine.clock, engine.clock.advance, submit_for_s)
    engine.pool.check()
    figures = figures_of(driven, summary_of(driven, options.objectives_ms))
    return Run(driven, figures, engine.device.num_steps)
