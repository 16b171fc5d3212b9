"""The CUDA driver's virtual memory: what the host driver's tests check, on a device."""

from __future__ import annotations

import random

import pytest
import torch

from engine.config import MemoryConfig, SchedulerConfig
from engine.errors import ConfigError, DriverError
from engine.memory.kv_cache import KvGeometry
from engine.messages import GenerateRequest, SamplingParams
from tests.fakes import VOCAB, Bench, answer

pytestmark = pytest.mark.gpu

CHUNK = 2 << 20
GEOMETRY = KvGeometry.choose(4, 64, 128, 4, CHUNK, min_tokens=32)  # 32 tokens a chunk


@pytest.fixture
def vm():  # type: ignore[no-untyped-def] # the class needs the driver to be imported
    from engine.memory.cuda_vmm import CudaVirtualMemory

    return CudaVirtualMemory(torch.device("cuda", 0), CHUNK)


def test_aliases_moves_and_views(vm) -> None:  # type: ignore[no-untyped-def]
    base = vm.reserve(1 << 20)  # two TiB of addresses
    one, two = vm.create(), vm.create()
    vm.map(base, [one, two])
    vm.map(base + 1000 * CHUNK, [one])
    view = vm.view(base, 1 << 20)
    view[:CHUNK] = 7
    view[CHUNK : 2 * CHUNK] = 9
    assert bool((view[1000 * CHUNK : 1001 * CHUNK] == 7).all())
    torch.cuda.synchronize()
    vm.unmap(base + CHUNK, 1)
    vm.map(base + 5 * CHUNK, [two])
    assert bool((view[5 * CHUNK : 6 * CHUNK] == 9).all())


def test_released_memory_goes_back_to_the_device(vm) -> None:  # type: ignore[no-untyped-def]
    free, _ = torch.cuda.mem_get_info()
    handles = [vm.create() for _ in range(64)]
    assert free - torch.cuda.mem_get_info()[0] >= 64 * CHUNK
    for handle in handles:
        vm.release(handle)
    assert torch.cuda.mem_get_info()[0] >= free - CHUNK


def test_a_refused_map_leaves_nothing_mapped(vm) -> None:  # type: ignore[no-untyped-def]
    base = vm.reserve(4)
    one, two, three = (vm.create() for _ in range(3))
    vm.map(base + CHUNK, [one])
    with pytest.raises(DriverError, match="cuMem"):
        vm.map(base, [two, three])  # the second place is taken
    vm.map(base, [two])
    vm.view(base, 2).fill_(1)


def test_a_wrong_chunk_size_is_explained() -> None:
    from engine.memory.cuda_vmm import CudaVirtualMemory

    with pytest.raises(ConfigError, match="multiple of 2097152"):
        CudaVirtualMemory(torch.device("cuda", 0), 4096)


@pytest.mark.parametrize("mode", ["elastic", "static"])
def test_the_engine_keeps_every_sequence_intact(vm, mode: str) -> None:  # type: ignore[no-untyped-def]
    """Growth, preemption and slots used again over device memory, with every key read back."""
    scheduler = SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=64)
    bench = Bench(44, MemoryConfig(mode=mode), scheduler, 256, vm, GEOMETRY)  # type: ignore[arg-type]
    rng = random.Random(1)
    requests = [
        GenerateRequest(
            f"r{i}",
            tuple(rng.choices(range(1, VOCAB), k=20 + i)),
            SamplingParams(max_tokens=60),
        )
        for i in range(10)
    ]
    for request in requests:
        bench.engine.submit(request)
    bench.run()
    for request in requests:
        assert bench.deltas[request.request_id].token_ids == answer(request.prompt_token_ids, 60)
    assert bench.scheduler.num_preemptions > 0
    bench.assert_idle()
