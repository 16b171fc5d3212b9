"""Everything the pool does, under load, on a device with two steps in flight, every key read back.

The one of 20 turns is short enough for compute-sanitizer. A stray read of unmapped memory ends the process
even without it.
"""

from __future__ import annotations

import random

import pytest
import torch

from engine.config import MemoryConfig, Mode, SchedulerConfig
from engine.memory.balloon import Balloon
from engine.memory.kv_geometry import KvGeometry
from engine.memory.slabs import PinnedSlabs
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


def with_balloon(dice: random.Random, limits: SchedulerConfig) -> Bench:
    """An engine in tight memory beside 160 chunks of pinned host memory."""
    from engine.memory.cuda_copies import CudaCopies
    from engine.memory.cuda_vmm import CudaVirtualMemory

    device = torch.device("cuda", 0)
    balloon = Balloon(PinnedSlabs(device), CHUNK, 160, 80, is_filled=True)
    while balloon.num_physical < 160:
        balloon.grow_ahead()
    return Bench(
        dice.choice([44, 60]),
        MemoryConfig(map_ahead_tokens=dice.choice([0, 8, 40])),
        limits,
        vm=CudaVirtualMemory(device, CHUNK),
        geometry=GEOMETRY,
        steps_ahead=1,
        runner=DevicePatternRunner,
        sampler=DevicePatternSampler,
        balloon=balloon,
        copies=CudaCopies(device, CHUNK),
    )


@pytest.mark.parametrize(("seed", "turns"), [(10, 20), (11, 120), (12, 120), (13, 120)])
def test_sequences_that_take_turns(seed: int, turns: int) -> None:
    """The same while sequences leave for pinned host memory and come back, beside the steps."""
    dice = random.Random(seed)
    limits = SchedulerConfig(
        max_num_seqs=dice.choice([6, 12]),
        max_num_batched_tokens=64,
        turn_tokens=1,
        min_retained_chunks=dice.choice([0, 1024]),
    )
    bench = with_balloon(dice, limits)
    converse(bench, seed, turns)
    assert isinstance(bench.runner, DevicePatternRunner)
    assert int(bench.runner.num_wrong) == 0
    assert bench.engine.snapshot.num_parkings > 0
    assert bench.num_held == 0


@pytest.mark.parametrize(("seed", "turns"), [(20, 20), (21, 120), (22, 120), (23, 120)])
def test_prompts_that_are_computed_into_host_memory(seed: int, turns: int) -> None:
    """Layer groups share chunks, and each is copied away before the next is written there."""
    dice = random.Random(seed)
    limits = SchedulerConfig(max_num_seqs=dice.choice([6, 12]), max_num_batched_tokens=256, policy="fcfs")
    bench = with_balloon(dice, limits)
    converse(bench, seed, turns)
    assert isinstance(bench.runner, DevicePatternRunner)
    assert int(bench.runner.num_wrong) == 0
    assert turns < 100 or bench.scheduler.turns.decisions["layer_wise"] > 0
    assert bench.num_held == 0
