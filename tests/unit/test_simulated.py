"""Simulated copies take the time that a link would, and memory that is not there is as strict as memory."""

from __future__ import annotations

import logging
import time

import pytest
import torch

from engine.errors import DriverError
from engine.memory.balloon import Balloon
from engine.memory.chunks import ChunkPool
from engine.memory.copies import Direction
from engine.memory.virtual_tensor import VirtualTensor
from engine.memory.vmm import Move, Moved, Outcome
from engine.simulated import NullSlabs, NullVirtualMemory, SimulatedCopies, VirtualClock

CHUNK = 2 << 20
CHUNKS_PER_S = 4
IN, OUT = Direction.IN, Direction.OUT


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(100.0)


@pytest.fixture
def copies(clock: VirtualClock) -> SimulatedCopies:
    return SimulatedCopies(CHUNK, clock, CHUNKS_PER_S * CHUNK)


@pytest.fixture
def vm() -> NullVirtualMemory:
    return NullVirtualMemory(CHUNK, max_chunks=8)


def places(base: int, *indices: int) -> list[int]:
    return [base + index * CHUNK for index in indices]


def test_a_moment_that_rounding_loses_passes() -> None:
    """A load that began at another time than 0 waited for its first request for ever."""
    clock = VirtualClock(1e6)
    clock.advance(1e-15)
    assert 1e6 < clock() < 1e6 + 1e-6
    clock.advance(0.0)
    assert clock() < 1e6 + 1e-6


def test_time_passes_when_it_is_told_to_and_never_back(clock: VirtualClock) -> None:
    clock.advance(2.5)
    assert clock() == 102.5
    clock.advance_to(104.0)
    clock.advance_to(1.0)
    assert clock() == 104.0


def test_a_copy_takes_the_time_of_the_link(copies: SimulatedCopies, clock: VirtualClock) -> None:
    ticket = copies.submit(OUT, [1, 2], [3, 4], after_steps=False)
    clock.advance(0.49)
    assert not ticket.is_done
    clock.advance_to(100.5)
    assert ticket.is_done
    assert (copies.bytes_moved(OUT), copies.bytes_moved(IN)) == (2 * CHUNK, 0)


def test_a_direction_is_serial_and_the_other_has_its_own_link(
    copies: SimulatedCopies, clock: VirtualClock
) -> None:
    first = copies.submit(OUT, [1] * 4, [3] * 4, after_steps=False)
    second = copies.submit(OUT, [1], [3], after_steps=False)
    back = copies.submit(IN, [1] * 2, [3] * 2, after_steps=False)
    clock.advance_to(100.5)
    assert (first.is_done, second.is_done, back.is_done) == (False, False, True)
    clock.advance_to(101.0)
    assert (first.is_done, second.is_done) == (True, False)
    clock.advance_to(101.25)
    assert second.is_done


def test_an_idle_link_begins_when_it_is_asked(copies: SimulatedCopies, clock: VirtualClock) -> None:
    copies.submit(IN, [1], [3], after_steps=False)
    clock.advance_to(200.0)
    late = copies.submit(IN, [1], [3], after_steps=False)
    assert not late.is_done
    late.wait()
    assert clock() == 200.25
    assert late.is_done
    late.wait()
    assert clock() == 200.25
    copies.submit(IN, [], [], after_steps=False).wait()
    assert clock() == 200.25
    with pytest.raises(ValueError, match="shorter"):
        copies.submit(IN, [1, 2], [3], after_steps=False)


def test_copies_behind_a_step_begin_with_its_end(clock: VirtualClock) -> None:
    copies = SimulatedCopies(CHUNK, clock, CHUNKS_PER_S * CHUNK, steps_end=lambda: 103.0)
    beside = copies.submit(OUT, [1], [3], after_steps=False)
    behind = copies.submit(OUT, [1], [3], after_steps=True)
    after = copies.submit(OUT, [1], [3], after_steps=False)
    beside.wait()
    assert clock() == 100.25
    behind.wait()
    assert clock() == 103.25
    after.wait()
    assert clock() == 103.5


def test_in_real_time_a_wait_sleeps() -> None:
    copies = SimulatedCopies(CHUNK, time.monotonic, 20 * CHUNK)
    begin = time.monotonic()
    copies.submit(OUT, [1], [3], after_steps=True).wait()
    assert 0.05 <= time.monotonic() - begin < 5.0
    copies.close()


def test_memory_that_is_not_there_is_as_strict_as_a_gpu(
    vm: NullVirtualMemory, caplog: pytest.LogCaptureFixture
) -> None:
    base, other = vm.reserve(4), vm.reserve(1)
    assert base % CHUNK == other % CHUNK == 0
    one, two, three = vm.create(3)
    vm.map(places(base, 0, 1), [one, two])
    with pytest.raises(DriverError, match="simulated map failed: File exists"):
        vm.map(places(base, 1), [three])
    for nowhere in (base - CHUNK, base + 4 * CHUNK, other + CHUNK, other + 1):
        with pytest.raises(DriverError, match="Invalid"):
            vm.map([nowhere], [three])
    assert vm.unmap(places(base, 0, 2, 1)) == 1
    assert vm.release([one, two, three]) == 1, "the second is mapped"
    with pytest.raises(DriverError, match="Invalid"):
        vm.map(places(base, 2), [one])  # released
    with pytest.raises(DriverError, match="Invalid"):
        vm.map(places(base, 2, 3), [three, 77])
    vm.map(places(base, 2), [three])  # nothing of the refused call stayed
    assert "unmap ended after 1 of 3 chunks: simulated unmap failed" in caplog.text
    assert "release ended after 1 of 3 chunks: simulated release failed" in caplog.text


def test_moves_are_done_at_once(vm: NullVirtualMemory) -> None:
    base = vm.reserve(4)
    (chunk,) = vm.create(1)
    vm.map([base], [chunk])
    ticket = vm.submit([Move(chunk, base, base + CHUNK), Move(None, None, base)])
    assert vm.is_done(ticket)
    moved, made = vm.collect(ticket)
    assert moved == Moved(chunk, Outcome.DONE)
    assert made.outcome is Outcome.DONE
    assert made.handle != chunk
    assert vm.unmap(places(base, 0, 1)) == 2


def test_no_more_chunks_than_there_are(vm: NullVirtualMemory, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    chunks = vm.create(10)
    assert len(set(chunks)) == 8
    assert "create ended after 8 of 10 chunks: simulated create failed" in caplog.text
    vm.release(chunks[:2])
    assert len(set(vm.create(2)) & set(chunks)) == 0


def test_calls_are_counted_one_a_chunk(vm: NullVirtualMemory) -> None:
    base = vm.reserve(4)
    chunks = vm.create(3)
    vm.map(places(base, 0, 1), chunks[:2])
    vm.unmap([base])
    vm.release(chunks[2:])
    assert (vm.num_calls, vm.num_calls_beside) == (7, 0)


def test_the_pool_runs_over_it(vm: NullVirtualMemory) -> None:
    pool = ChunkPool(vm, 8)
    tensor = VirtualTensor(pool, 16, "kv")
    chunks = pool.take(5, "kv")
    assert chunks is not None
    tensor.map(range(5), chunks)
    view = tensor.view(torch.bfloat16)
    assert (view.device.type, view.numel()) == ("meta", 16 * CHUNK // 2)
    tensor.drop(range(5))
    pool.finished(0)
    assert pool.num_free == 8
    pool.check()
    assert pool.trim() == 5
    vm.close()


def test_a_balloon_of_any_size_costs_nothing() -> None:
    balloon = Balloon(NullSlabs(), CHUNK, 1 << 20, 1 << 10, lambda: 1 << 50)
    give_up = time.monotonic() + 20
    while (chunks := balloon.take(3000)) is None:
        assert time.monotonic() < give_up
        time.sleep(0.001)
    assert len({balloon.address_of(chunk) for chunk in chunks}) == 3000
    balloon.check()
    balloon.close()
