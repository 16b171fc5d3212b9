"""Copies on a CPU: what arrives, in which order, what a failure looks like; and slabs, where they go."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import DriverError
from engine.memory.copies import Direction, Piece, ThreadCopies, Ticket, merge
from engine.memory.host_vmm import HostVirtualMemory
from engine.memory.slabs import PinnedSlabs, PlainSlabs, Slab

CHUNK = 8192
IN, OUT = Direction.IN, Direction.OUT
Move = Callable[[int, int, int], object]
MakeCopies = Callable[..., ThreadCopies]


@pytest.fixture
def make_copies() -> Iterator[MakeCopies]:
    made: list[ThreadCopies] = []

    def make(move: Move = ctypes.memmove) -> ThreadCopies:
        made.append(ThreadCopies(CHUNK, move))
        return made[-1]

    yield make
    for copies in made:
        copies.close()


def rows(address: int, *indices: int) -> list[int]:
    """Addresses of the chunks of a range."""
    return [address + index * CHUNK for index in indices]


def bytes_at(address: int, nbytes: int = CHUNK) -> torch.Tensor:
    """What is in memory, as a view."""
    return torch.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=torch.uint8)


class Gate:
    """Moves when it is let to."""

    def __init__(self) -> None:
        self.is_open = threading.Event()
        self.moved: list[Piece] = []

    def __call__(self, target: int, source: int, nbytes: int) -> None:
        self.is_open.wait()
        self.moved.append(Piece(target, source, nbytes))


def test_neighbours_at_both_ends_are_one_piece() -> None:
    assert list(merge([], [], 2)) == []
    assert list(merge([10], [50], 2)) == [Piece(10, 50, 2)]
    assert list(merge([10, 12, 14], [50, 52, 54], 2)) == [Piece(10, 50, 6)]
    assert list(merge([10, 12, 16, 18], [50, 52, 54, 56], 2)) == [Piece(10, 50, 4), Piece(16, 54, 4)]
    assert list(merge([10, 12], [52, 50], 2)) == [Piece(10, 52, 2), Piece(12, 50, 2)], "falling, not rising"
    with pytest.raises(ValueError, match="shorter"):
        list(merge([10, 12], [50], 2))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4))))
def test_pieces_are_the_chunks_in_their_order(pairs: list[tuple[int, int]]) -> None:
    targets, sources = [2 * target for target, _ in pairs], [2 * source for _, source in pairs]
    split = [
        (piece.target + offset, piece.source + offset)
        for piece in merge(targets, sources, 2)
        for offset in range(0, piece.nbytes, 2)
    ]
    assert split == list(zip(targets, sources, strict=True))


def test_chunks_go_out_and_come_back_elsewhere(make_copies: MakeCopies) -> None:
    vm, slab, copies = HostVirtualMemory(CHUNK, 8), PlainSlabs().make(4 * CHUNK), make_copies()
    base = vm.reserve(8)
    vm.map(rows(base, *range(8)), vm.create(8))
    memory = vm.view(base, 8)
    memory[: 4 * CHUNK] = torch.randint(0, 256, (4 * CHUNK,), dtype=torch.uint8)
    written = memory[: 4 * CHUNK].clone()
    out = copies.submit(OUT, rows(slab.address, 3, 0, 1, 2), rows(base, 0, 1, 2, 3), after_steps=True)
    out.wait()
    memory.zero_()
    copies.submit(IN, rows(base, 4, 5, 6, 7), rows(slab.address, 3, 0, 1, 2), after_steps=False).wait()
    assert torch.equal(memory[4 * CHUNK :], written)
    assert int(memory[: 4 * CHUNK].max()) == 0
    assert out.is_done
    assert (copies.bytes_moved(OUT), copies.bytes_moved(IN)) == (4 * CHUNK, 4 * CHUNK)


def test_traffic_both_ways_at_once_keeps_its_content(make_copies: MakeCopies) -> None:
    """Chunks that were saved come back while others leave, with nothing waited for but what is used next."""
    device, slab, copies = PlainSlabs().make(64 * CHUNK), PlainSlabs().make(64 * CHUNK), make_copies()
    chooser = random.Random(7)
    left, right = bytes_at(device.address, 64 * CHUNK), bytes_at(slab.address, 64 * CHUNK)
    left.copy_(torch.randint(0, 256, (64 * CHUNK,), dtype=torch.uint8))
    right.copy_(torch.randint(0, 256, (64 * CHUNK,), dtype=torch.uint8))
    wanted = {row: left[row * CHUNK : (row + 1) * CHUNK].clone() for row in range(32)}
    for _ in range(20):
        leaving = chooser.sample(range(32), 16)
        saved = chooser.sample(range(32), 16)
        out = copies.submit(OUT, rows(slab.address, *saved), rows(device.address, *leaving), False)
        # Rows 32 and up go the other way meanwhile.
        there = chooser.sample(range(32, 64), 16)
        back = copies.submit(IN, rows(device.address, *there), rows(slab.address, *there), False)
        out.wait()
        for row in leaving:
            left[row * CHUNK : (row + 1) * CHUNK] = 0
        copies.submit(IN, rows(device.address, *leaving), rows(slab.address, *saved), False).wait()
        assert back.is_done, "in order in a direction"
        for row in there:
            assert torch.equal(bytes_at(device.address + row * CHUNK), bytes_at(slab.address + row * CHUNK))
    for row, content in wanted.items():
        assert torch.equal(bytes_at(device.address + row * CHUNK), content)
    assert copies.bytes_moved(OUT) == 20 * 16 * CHUNK
    assert copies.bytes_moved(IN) == 20 * 32 * CHUNK


def test_a_direction_is_a_queue_and_the_other_does_not_wait(make_copies: MakeCopies) -> None:
    gates = {1: Gate(), 2: Gate()}
    copies = make_copies(lambda target, source, nbytes: gates[target % 8](target, source, nbytes))
    blocked = copies.submit(OUT, [8 + 1], [64], False)
    behind = copies.submit(OUT, [8 + 2], [72], False)
    gates[2].is_open.set()
    copies.submit(IN, [16 + 2], [80], False).wait()
    assert not blocked.is_done
    assert not behind.is_done
    gates[1].is_open.set()
    behind.wait()
    assert blocked.is_done
    assert gates[2].moved == [Piece(18, 80, CHUNK), Piece(10, 72, CHUNK)]


def test_nothing_to_copy_is_done(make_copies: MakeCopies) -> None:
    copies = make_copies()
    copies.submit(IN, [], [], after_steps=True).wait()
    assert copies.bytes_moved(IN) == 0


def test_a_failed_copy_ends_its_ticket_and_no_other(make_copies: MakeCopies) -> None:
    moved: list[int] = []

    def move(target: int, source: int, nbytes: int) -> None:
        if source == 666:
            raise OSError("bad address")
        if source == 667:
            raise ArithmeticError
        moved.append(target)

    copies = make_copies(move)
    failed = copies.submit(OUT, [1, 5, 9], [100, 666, 300], False)
    nameless = copies.submit(OUT, [13], [667], False)
    copies.submit(OUT, [17], [400], False).wait()
    assert moved == [1, 17], "what is behind a failed copy of its ticket is not made"
    assert failed.is_done
    for _ in range(2):
        with pytest.raises(DriverError, match="memmove failed: bad address"):
            failed.wait()
    with pytest.raises(DriverError, match="ArithmeticError"):
        nameless.wait()


def test_waiting_is_done_by_whoever_waits(make_copies: MakeCopies) -> None:
    gate = Gate()
    ticket: Ticket = make_copies(gate).submit(IN, [8], [16], False)
    timer = threading.Timer(0.05, gate.is_open.set)
    timer.start()
    assert not ticket.is_done
    ticket.wait()
    assert ticket.is_done
    timer.join()


def test_close_finishes_what_was_submitted() -> None:
    gate = Gate()
    copies = ThreadCopies(CHUNK, gate)
    tickets = [copies.submit(direction, [8], [16], False) for direction in Direction for _ in range(5)]
    timer = threading.Timer(0.05, gate.is_open.set)
    timer.start()
    copies.close()
    assert all(ticket.is_done for ticket in tickets)
    assert not any(thread.is_alive() for thread in copies._threads)
    copies.close()
    timer.join()


def test_dropped_copies_end_their_threads() -> None:
    copies = ThreadCopies(CHUNK)
    threads = copies._threads
    del copies
    gc.collect()
    for thread in threads:
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in threads)


def test_plain_slabs_cost_nothing_until_they_are_touched() -> None:
    before = resident_bytes()
    slab = PlainSlabs().make(256 << 20)
    assert slab.address % (2 << 20) == 0
    assert resident_bytes() - before < 32 << 20
    bytes_at(slab.address, 64 << 20).fill_(1)
    assert resident_bytes() - before >= 60 << 20
    slab.free()
    assert resident_bytes() - before < 32 << 20


def test_slabs_never_touch() -> None:
    slabs = [PlainSlabs().make(2 << 20) for _ in range(8)]
    addresses = sorted(slab.address for slab in slabs)
    assert all(high - low > 2 << 20 for low, high in zip(addresses, addresses[1:], strict=False))


def test_memory_that_the_system_refuses_is_a_driver_error() -> None:
    with pytest.raises(DriverError, match="mmap failed: Cannot allocate memory"):
        PlainSlabs().make(1 << 48)


class PinsWrittenDown:
    """Stands in the place of the CUDA runtime."""

    def __init__(self, refuses: bool = False) -> None:
        self.pinned: dict[int, int] = {}
        self.resident: int | None = None
        self._refuses = refuses

    def pin(self, address: int, nbytes: int) -> None:
        self.resident = resident_bytes()
        if self._refuses:
            raise DriverError("cudaHostRegister", "out of memory")
        bytes_at(address, nbytes)[-1] = 1  # still mapped
        self.pinned[address] = nbytes

    def unpin(self, address: int) -> None:
        bytes_at(address)[0] = 1  # still mapped
        del self.pinned[address]


def pinned_slab(pins: PinsWrittenDown) -> Slab:
    """48 MiB, which is not a whole number of the pieces that are touched at a time."""
    return PinnedSlabs(torch.device("cpu"), pins).make(48 << 20)


def test_pinned_slabs_are_touched_first_and_unpinned_last() -> None:
    pins, before = PinsWrittenDown(), resident_bytes()
    slab = pinned_slab(pins)
    assert pins.pinned == {slab.address: 48 << 20}
    assert (pins.resident or 0) - before >= 47 << 20
    slab.free()
    assert pins.pinned == {}
    slab.free()
    assert resident_bytes() - before < 24 << 20


def test_a_dropped_slab_is_unpinned() -> None:
    pins = PinsWrittenDown()
    slab = pinned_slab(pins)
    assert pins.pinned
    del slab
    gc.collect()
    assert pins.pinned == {}


def test_memory_that_cannot_be_pinned_goes_back() -> None:
    pins, before = PinsWrittenDown(refuses=True), resident_bytes()
    with pytest.raises(DriverError, match="cudaHostRegister"):
        pinned_slab(pins)
    assert resident_bytes() - before < 24 << 20


def resident_bytes() -> int:
    """Memory of this process that is really there."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
