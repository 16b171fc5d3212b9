"""The CUDA driver's virtual memory: what the host driver's tests check, on a device."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
import torch

from engine.config import MemoryConfig, SchedulerConfig
from engine.errors import ConfigError, DriverError
from engine.memory import native
from engine.memory.kv_geometry import KvGeometry
from engine.memory.vmm import Move, Moved, Outcome
from engine.messages import GenerateRequest, SamplingParams
from tests.failing_memory import Refusals
from tests.fakes import VOCAB, Bench, answer

if TYPE_CHECKING:
    from engine.memory.cuda_vmm import CudaVirtualMemory

pytestmark = pytest.mark.gpu

CHUNK = 2 << 20
GEOMETRY = KvGeometry.choose(4, 64, 128, 4, CHUNK, min_tokens=32)  # 32 tokens a chunk
OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
DEVICE = torch.device("cuda", 0)

Make = Callable[..., "CudaVirtualMemory"]


@pytest.fixture(params=["native", "python"])
def make_vm(request: pytest.FixtureRequest) -> Iterator[Make]:
    from engine.memory.cuda_vmm import CudaVirtualMemory  # needs the driver to be imported

    if request.param == "native" and native.load() is None:
        pytest.skip("no C compiler")
    made: list[CudaVirtualMemory] = []

    def make(margin_bytes: int = 0) -> CudaVirtualMemory:
        made.append(CudaVirtualMemory(DEVICE, CHUNK, margin_bytes, use_native=request.param == "native"))
        return made[-1]

    yield make
    for vm in made:
        vm.close()


@pytest.fixture
def vm(make_vm: Make) -> CudaVirtualMemory:
    return make_vm()


def free_bytes() -> int:
    """What is free on the device, for all processes."""
    return int(torch.cuda.mem_get_info()[0])


def places(base: int, *rows: int) -> list[int]:
    """Addresses of rows of a range."""
    return [base + row * CHUNK for row in rows]


def test_aliases_moves_and_views(vm: CudaVirtualMemory) -> None:
    base = vm.reserve(1 << 20)  # two TiB of addresses
    one, two = vm.create(2)
    vm.map(places(base, 0, 1, 1000), [one, two, one])
    view = vm.view(base, 1 << 20)
    view[:CHUNK] = 7
    view[CHUNK : 2 * CHUNK] = 9
    assert bool((view[1000 * CHUNK : 1001 * CHUNK] == 7).all())
    torch.cuda.synchronize()
    assert vm.unmap(places(base, 1)) == 1
    vm.map(places(base, 5), [two])
    assert bool((view[5 * CHUNK : 6 * CHUNK] == 9).all())


def test_submitted_moves_end_in_their_order(vm: CudaVirtualMemory) -> None:
    base = vm.reserve(8)
    (chunk,) = vm.create(1)
    vm.map([base], [chunk])
    view = vm.view(base, 8)
    view[:CHUNK] = 5
    torch.cuda.synchronize()
    first = vm.submit([Move(chunk, base, base + CHUNK), Move(None, None, base)])
    second = vm.submit([Move(chunk, base + CHUNK, None), Move(chunk, None, base + 3 * CHUNK)])
    assert vm.collect(second) == [Moved(chunk, Outcome.DONE)] * 2
    assert vm.is_done(first)
    moved, made = vm.collect(first)
    assert moved == Moved(chunk, Outcome.DONE)
    assert made.outcome is Outcome.DONE
    view[:CHUNK] = 3
    assert bool((view[3 * CHUNK : 4 * CHUNK] == 5).all())


def test_thousands_of_moves_beside_kernels_and_calls_at_once(vm: CudaVirtualMemory) -> None:
    """Chunks wander through 256 places while kernels run, and others are made, mapped and released."""
    rng = random.Random(1)
    base, other = vm.reserve(256), vm.reserve(8)
    chunks = vm.create(64)
    guard, *rest = chunks
    row_of = dict(zip(rest, rng.sample(range(1, 256), 63), strict=True)) | {guard: 0}
    vm.map(places(base, *(row_of[chunk] for chunk in chunks)), chunks)
    view = vm.view(base, 256).view(256, CHUNK)
    for index, chunk in enumerate(chunks):
        view[row_of[chunk]] = index
    ballast = torch.randn(2048, 2048, device=DEVICE)
    tickets: list[int] = []
    torch.cuda.synchronize()
    for _ in range(40):
        free = list(set(range(256)) - set(row_of.values()))
        moves = []
        for chunk, row in zip(rng.sample(rest, 32), rng.sample(free, 32), strict=True):
            moves.append(Move(chunk, base + row_of[chunk] * CHUNK, base + row * CHUNK))
            row_of[chunk] = row
        tickets.append(vm.submit(moves))
        ballast = torch.nn.functional.normalize(ballast @ ballast)
        mine = vm.create(8)
        vm.map(places(other, *range(8)), mine)
        vm.view(other, 8).fill_(255)
        torch.cuda.synchronize()
        assert (vm.unmap(places(other, *range(8))), vm.release(mine)) == (8, 8)
    for ticket in tickets:
        assert {moved.outcome for moved in vm.collect(ticket)} == {Outcome.DONE}
    for index, chunk in enumerate(chunks):
        assert bool((view[row_of[chunk]] == index).all())
    assert vm.num_calls_beside in (0, 40 * 32 * 2)


def test_released_memory_goes_back_to_the_device(vm: CudaVirtualMemory) -> None:
    free = free_bytes()
    handles = vm.create(64)
    assert free - free_bytes() >= 64 * CHUNK
    assert vm.release(handles) == 64
    assert free_bytes() >= free - CHUNK


def test_close_gives_back_what_is_made_and_mapped(make_vm: Make) -> None:
    vm = make_vm()
    free = free_bytes()
    base = vm.reserve(64)
    vm.map(places(base, *range(0, 64, 2)), vm.create(32))
    vm.submit([Move(None, None, place) for place in places(base, *range(1, 64, 2))])
    vm.close()
    vm.close()
    assert free_bytes() >= free - CHUNK


def test_memory_goes_back_when_nobody_refers_to_it() -> None:
    from engine.memory.cuda_vmm import CudaVirtualMemory

    vm = CudaVirtualMemory(DEVICE, CHUNK)
    base = vm.reserve(64)
    vm.map(places(base, *range(64)), vm.create(64))
    view = vm.view(base, 64)
    del vm
    view[-1] = 7
    assert int(view[-1]) == 7
    free = free_bytes()
    del view
    assert free_bytes() >= free + 64 * CHUNK


def test_the_margin_is_left_to_others(make_vm: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Somebody else takes memory after the driver was made: it stops where the margin begins."""
    somebody = make_vm()  # not a tensor: torch may have cached room for it, and take nothing from the device
    free = free_bytes()
    caplog.set_level(logging.DEBUG)
    vm = make_vm(margin_bytes=free - 64 * CHUNK)
    taken = somebody.create(32)
    made = vm.create(100)
    assert 0 < len(made) <= 32
    assert "no more than the margin is free" in caplog.text
    base = vm.reserve(1)
    assert vm.collect(vm.submit([Move(None, None, base)])) == [Moved(None, Outcome.NOT_MADE)]
    assert free_bytes() >= free - 64 * CHUNK
    assert somebody.release(taken) == 32
    assert vm.create(1) != []


def test_a_refused_map_leaves_nothing_mapped(vm: CudaVirtualMemory) -> None:
    base = vm.reserve(4)
    one, two, three = vm.create(3)
    vm.map(places(base, 1), [one])
    with pytest.raises(DriverError, match="cuMemMap"):
        vm.map(places(base, 0, 1), [two, three])  # the second place is taken
    vm.map([base], [two])
    vm.view(base, 2).fill_(1)


@pytest.mark.parametrize(
    ("call", "outcome", "name"),
    [
        ("create", Outcome.NOT_MADE, "cuMemCreate"),
        ("unmap", Outcome.STAYED, "cuMemUnmap"),
        ("map", Outcome.UNMAPPED, "cuMemMap"),
        ("access", Outcome.UNMAPPED, "cuMemSetAccess"),
    ],
)
def test_each_call_refused_once(
    vm: CudaVirtualMemory, call: str, outcome: Outcome, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    base = vm.reserve(4)
    (chunk,) = vm.create(1)
    vm.map([base], [chunk])
    refusals = Refusals(vm, OUT_OF_MEMORY)
    refusals.refuse(call)
    move = Move(None, None, base + CHUNK) if call == "create" else Move(chunk, base, base + CHUNK)
    ((_, ended),) = vm.collect(vm.submit([move]))
    assert ended is outcome
    assert f"{name} failed: CUDA_ERROR_OUT_OF_MEMORY" in caplog.text
    still = Move(chunk, base if ended in (Outcome.STAYED, Outcome.NOT_MADE) else None, base + 2 * CHUNK)
    assert vm.collect(vm.submit([still])) == [Moved(chunk, Outcome.DONE)]
    vm.view(base + 2 * CHUNK, 1).fill_(1)
    torch.cuda.synchronize()


def test_a_map_refused_at_once_is_undone(vm: CudaVirtualMemory) -> None:
    base = vm.reserve(4)
    handles = vm.create(4)
    refusals = Refusals(vm, OUT_OF_MEMORY)
    for call, name in (("map", "cuMemMap"), ("access", "cuMemSetAccess")):
        refusals.refuse(call, after=2)
        with pytest.raises(DriverError, match=name):
            vm.map(places(base, *range(4)), handles)
    vm.map(places(base, *range(4)), handles)
    assert vm.unmap(places(base, *range(4))) == 4
    refusals.refuse("release", after=3)
    assert vm.release(handles) == 3


def test_a_wrong_chunk_size_is_explained() -> None:
    from engine.memory.cuda_vmm import CudaVirtualMemory

    with pytest.raises(ConfigError, match="multiple of 2097152"):
        CudaVirtualMemory(DEVICE, 4096)


@pytest.mark.parametrize("mode", ["elastic", "static"])
def test_the_engine_keeps_every_sequence_intact(vm: CudaVirtualMemory, mode: str) -> None:
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
    assert bench.scheduler.num_preemptions > 0 or mode == "static"
    bench.assert_idle()
