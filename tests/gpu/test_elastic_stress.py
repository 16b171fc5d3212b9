"""Everything the pool does, under load, on a device with two steps in flight, every key read back.

The one of 20 turns is short enough for compute-sanitizer. A stray read of unmapped memory ends the process
even without it.
"""

from __future__ import annotations

import random

import pytest
import torch

from engine.config import MemoryConfig, Mode, SchedulerConfig
from engine.memory.kv_cache import KvGeometry
from tests.fakes import Bench
from tests.gpu.device_pattern import DevicePatternRunner, DevicePatternSampler
from tests.unit.engine_cases import converse

pytestmark = pytest.mark.gpu

CHUNK = 2 << 20
GEOMETRY = KvGeometry.choose(4, 64, 128, 4, CHUNK, min_tokens=32)  # a layer and 32 tokens a chunk


@pytest.mark.parametrize("mode", ["elastic", "virtual"])
@pytest.mark.parametrize(("seed", "turns"), [(0, 20), (1, 120), (2, 120), (3, 120)])
def test_conversations_in_tight_memory(mode: Mode, seed: int, turns: int) -> None:
    from engine.memory.cuda_vmm import CudaVirtualMemory

    dice = random.Random(seed)
    vm = CudaVirtualMemory(torch.device("cuda", 0), CHUNK)
    limits = SchedulerConfig(max_num_seqs=dice.choice([3, 6]), max_num_batched_tokens=dice.choice([24, 64]))
    config = MemoryConfig(mode=mode, map_ahead_tokens=dice.choice([0, 8, 40]))
    bench = Bench(
        dice.choice([44, 60, 90]),
        config,
        limits,
        vm=vm,
        geometry=GEOMETRY,
        steps_ahead=1,
        runner=DevicePatternRunner,
        sampler=DevicePatternSampler,
    )
    converse(bench, seed, turns)
    assert isinstance(bench.runner, DevicePatternRunner)
    assert int(bench.runner.num_wrong) == 0
