"""Copies between a device's chunks and pinned host chunks: content both ways, order, and refusals."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import torch

from engine.errors import DriverError
from engine.memory import native
from engine.memory.balloon import Balloon
from engine.memory.copies import Direction
from engine.memory.slabs import CudaPins, PinnedSlabs, Slab

if TYPE_CHECKING:
    from engine.memory.cuda_copies import CudaCopies
    from engine.memory.cuda_vmm import CudaVirtualMemory

pytestmark = pytest.mark.gpu

CHUNK = 2 << 20
ROWS = 24
DEVICE = torch.device("cuda", 0)
IN, OUT = Direction.IN, Direction.OUT
LONG = 1_000_000_000  # clock cycles of a kernel that does nothing, about half a second


class Device:
    """A range of mapped chunks, as a view of a row each."""

    def __init__(self, vm: CudaVirtualMemory) -> None:
        self.vm = vm
        self.address = vm.reserve(ROWS)
        vm.map(self.places(range(ROWS)), vm.create(ROWS))
        self.rows = vm.view(self.address, ROWS).view(ROWS, CHUNK)

    def places(self, rows: range | list[int]) -> list[int]:
        return [self.address + row * CHUNK for row in rows]


@pytest.fixture
def device() -> Iterator[Device]:
    from engine.memory.cuda_vmm import CudaVirtualMemory  # needs the driver to be imported

    vm = CudaVirtualMemory(DEVICE, CHUNK)
    yield Device(vm)
    vm.close()


@pytest.fixture(params=["native", "python"])
def copies(request: pytest.FixtureRequest) -> Iterator[CudaCopies]:
    from engine.memory.cuda_copies import CudaCopies

    if request.param == "native" and native.load() is None:
        pytest.skip("no C compiler")
    made = CudaCopies(DEVICE, CHUNK, use_native=request.param == "native")
    yield made
    made.close()


@pytest.fixture
def make_slab() -> Iterator[Callable[[int], Slab]]:
    made: list[Slab] = []

    def make(num_chunks: int) -> Slab:
        made.append(PinnedSlabs(DEVICE).make(num_chunks * CHUNK))
        return made[-1]

    yield make
    torch.cuda.synchronize()
    for slab in made:
        slab.free()


def host_rows(slab: Slab, num_chunks: int) -> torch.Tensor:
    """A slab's chunks, as a view of a row each."""
    buffer = (ctypes.c_char * (num_chunks * CHUNK)).from_address(slab.address)
    return torch.frombuffer(buffer, dtype=torch.uint8).view(num_chunks, CHUNK)


def places(slab: Slab, rows: range | list[int]) -> list[int]:
    return [slab.address + row * CHUNK for row in rows]


def test_scattered_chunks_go_out_and_come_back(
    device: Device, copies: CudaCopies, make_slab: Callable[[int], Slab]
) -> None:
    slab, chooser = make_slab(ROWS), random.Random(3)
    device.rows.random_(0, 256)
    written = device.rows.clone()
    there, here = (chooser.sample(range(ROWS), ROWS) for _ in range(2))
    out = copies.submit(OUT, places(slab, there), device.places(here), after_steps=True)
    out.wait()
    assert out.is_done
    assert torch.equal(host_rows(slab, ROWS)[there], written[here].cpu())
    device.rows.zero_()
    copies.submit(IN, device.places(here), places(slab, there), after_steps=True).wait()
    assert torch.equal(device.rows, written)
    assert (copies.bytes_moved(OUT), copies.bytes_moved(IN)) == (ROWS * CHUNK, ROWS * CHUNK)


def test_neighbours_are_copied_as_one_piece_over_many_handles(
    device: Device, copies: CudaCopies, make_slab: Callable[[int], Slab]
) -> None:
    slab = make_slab(ROWS)
    device.rows.random_(0, 256)
    copies.submit(OUT, places(slab, range(ROWS)), device.places(range(ROWS)), after_steps=True).wait()
    assert torch.equal(host_rows(slab, ROWS), device.rows.cpu())
    host_rows(slab, ROWS).fill_(9)
    copies.submit(IN, device.places(range(ROWS)), places(slab, range(ROWS)), after_steps=False).wait()
    assert bool((device.rows == 9).all())


def test_copies_wait_for_the_step_that_writes(
    device: Device, copies: CudaCopies, make_slab: Callable[[int], Slab]
) -> None:
    slab = make_slab(1)
    device.rows[0].fill_(1)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    device.rows[0].fill_(2)
    behind = copies.submit(OUT, places(slab, [0]), device.places([0]), after_steps=True)
    assert not behind.is_done, "the step is still running"
    behind.wait()
    assert bool((host_rows(slab, 1) == 2).all())


def test_copies_beside_a_step_do_not_wait_for_it(
    device: Device, copies: CudaCopies, make_slab: Callable[[int], Slab]
) -> None:
    slab = make_slab(2)
    device.rows[0].fill_(1)
    host_rows(slab, 2)[1].fill_(5)
    torch.cuda.synchronize()
    torch.cuda._sleep(LONG)
    step = torch.cuda.Event()
    step.record()
    copies.submit(OUT, places(slab, [0]), device.places([0]), after_steps=False).wait()
    copies.submit(IN, device.places([1]), places(slab, [1]), after_steps=False).wait()
    assert not step.query(), "both were done while the step ran"
    assert bool((host_rows(slab, 2)[0] == 1).all())
    assert bool((device.rows[1] == 5).all())


def test_a_refused_copy_is_told_by_its_ticket(
    device: Device, copies: CudaCopies, make_slab: Callable[[int], Slab]
) -> None:
    """Before the device is asked: the driver knows no memory there. The copy before it is made."""
    slab = make_slab(2)
    device.rows[:2].fill_(3)
    nowhere = device.address + 4 * ROWS * CHUNK
    failed = copies.submit(OUT, places(slab, [0, 1]), [device.address, nowhere], after_steps=True)
    with pytest.raises(DriverError, match="cuMemcpyDtoHAsync failed: CUDA_ERROR"):
        failed.wait()
    assert failed.is_done
    assert bool((host_rows(slab, 2)[0] == 3).all())
    copies.submit(OUT, places(slab, [1]), device.places([1]), after_steps=True).wait()
    assert bool((host_rows(slab, 2)[1] == 3).all()), "what is submitted later is copied"


def test_a_thread_that_entered_copies_before_it_has_computed_anything(
    device: Device, copies: CudaCopies, make_slab: Callable[[int], Slab]
) -> None:
    """The loop of an engine whose first act is to take a request over. A thread has no context by itself."""
    slab = make_slab(2)
    host_rows(slab, 2).fill_(7)

    def copy_in() -> None:
        copies.submit(IN, device.places([0, 1]), places(slab, [0, 1]), after_steps=False).wait()

    with ThreadPoolExecutor(1) as bare, pytest.raises(DriverError, match="cuMemcpyHtoDAsync"):
        bare.submit(copy_in).result()
    with ThreadPoolExecutor(1, initializer=device.vm.enter) as entered:
        entered.submit(copy_in).result()
    assert bool((device.rows[:2] == 7).all())


def test_a_balloon_of_pinned_slabs_keeps_what_it_is_given(device: Device, copies: CudaCopies) -> None:
    balloon = Balloon(PinnedSlabs(DEVICE), CHUNK, 3 * ROWS, 8)
    while (chunks := balloon.take(ROWS)) is None:
        balloon.check()
    addresses = [balloon.address_of(chunk) for chunk in chunks]
    device.rows.random_(0, 256)
    written = device.rows.clone()
    copies.submit(OUT, addresses, device.places(range(ROWS)), after_steps=True).wait()
    device.rows.zero_()
    copies.submit(IN, device.places(range(ROWS)), addresses, after_steps=True).wait()
    assert torch.equal(device.rows, written), "slabs that lie side by side are not copied as one piece"
    balloon.put_back(chunks)
    balloon.check()
    balloon.close()


def test_memory_that_is_pinned_already_is_refused(make_slab: Callable[[int], Slab]) -> None:
    slab = make_slab(1)
    with ThreadPoolExecutor(1) as balloon, pytest.raises(DriverError, match="cudaHostRegister failed"):
        balloon.submit(CudaPins(DEVICE).pin, slab.address, CHUNK).result()
    torch.zeros(1, device=DEVICE).add_(1)  # the refusal is no error of a kernel in this thread
