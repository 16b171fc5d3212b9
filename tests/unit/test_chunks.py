"""When dropped chunks are free, and the order in which free ones leave the places that still map them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.memory.chunks import ChunkPool
from engine.memory.host_vmm import HostVirtualMemory
from engine.memory.virtual_tensor import VirtualTensor

CHUNK = 4096
TOTAL = 6


@pytest.fixture
def pool() -> Iterator[ChunkPool]:
    vm = HostVirtualMemory(CHUNK, TOTAL)
    yield ChunkPool(vm, TOTAL)
    vm.close()


def _left_over(pool: ChunkPool) -> tuple[VirtualTensor, list[int]]:
    """Every chunk is free, and mapped in the first rows of a tensor; the chunks by row."""
    tensor = VirtualTensor(pool, 2 * TOTAL, "kv")
    chunks = pool.take(TOTAL, "kv") or []
    tensor.map(range(TOTAL), chunks)
    for row in range(TOTAL):
        tensor.drop([row])
        pool.settle()
    assert (pool.num_free, pool.num_warm, pool.num_spare) == (TOTAL, TOTAL, TOTAL)
    return tensor, chunks


def test_held_chunks_are_taken_last(pool: ChunkPool) -> None:
    tensor, chunks = _left_over(pool)
    pool.hold({chunks[0], chunks[2]})
    assert (pool.num_free, pool.num_spare) == (TOTAL, TOTAL - 2)
    assert set(pool.take(3, "kv") or []) == {chunks[1], chunks[3], chunks[4]}
    assert [tensor.can_adopt(row) for row in range(TOTAL)] == [True, False, True, False, False, True]
    assert set(pool.take(3, "kv") or []) == {chunks[0], chunks[2], chunks[5]}, "memory is memory"
    assert pool.num_spare == pool.num_free == 0


def test_held_chunks_are_not_sent_elsewhere(pool: ChunkPool) -> None:
    tensor, chunks = _left_over(pool)
    pool.hold(set(chunks[:-1]))
    pool.send_ahead([(tensor, TOTAL), (tensor, TOTAL + 1)])
    assert (pool.num_sent, pool.num_spare) == (1, 1), "only one could be sent, and it is for nobody yet"
    pool.receive(wait=True)
    assert tensor.can_adopt(TOTAL)
    assert all(tensor.can_adopt(row) for row in range(TOTAL - 1))


def test_a_chunk_on_its_way_to_be_held_is_not_spare(pool: ChunkPool) -> None:
    tensor, _ = _left_over(pool)
    pool.send_ahead([(tensor, TOTAL), (tensor, TOTAL + 1)], is_held=True)
    assert (pool.num_sent, pool.num_spare) == (2, TOTAL - 2)
    pool.receive(wait=True)
    assert (pool.num_sent, pool.num_spare) == (0, TOTAL - 2)
    pool.take(TOTAL - 2, "other")
    assert tensor.can_adopt(TOTAL)
    assert tensor.can_adopt(TOTAL + 1)


def test_a_chunk_is_held_until_another_call_does_not_name_it(pool: ChunkPool) -> None:
    tensor, chunks = _left_over(pool)
    pool.hold({chunks[0]})
    pool.hold({chunks[1]})
    assert pool.num_spare == TOTAL - 1
    assert chunks[1] not in (pool.take(TOTAL - 1, "kv") or [])
    assert not tensor.can_adopt(0)


def test_a_held_chunk_that_is_adopted_is_free_no_more(pool: ChunkPool) -> None:
    tensor, chunks = _left_over(pool)
    pool.hold(set(chunks[:2]))
    tensor.adopt(0)
    assert (pool.num_free, pool.num_spare, pool.num_owned("kv")) == (TOTAL - 1, TOTAL - 2, 1)
    tensor.drop([0])
    pool.settle()
    assert pool.num_spare == TOTAL - 1, "nobody has asked for it since"
    pool.hold(set(chunks))
    assert pool.num_spare == 0
    assert pool.trim() == TOTAL, "held chunks are free memory"
    pool.check()


def test_only_warm_chunks_can_be_held(pool: ChunkPool) -> None:
    tensor, chunks = _left_over(pool)
    tensor.adopt(0)
    pool.hold({chunks[0], 99})
    assert pool.num_spare == pool.num_free == TOTAL - 1
    pool.check()


def test_what_an_earlier_step_reads_does_not_wait_for_a_later_one(pool: ChunkPool) -> None:
    tensor = VirtualTensor(pool, TOTAL, "kv")
    tensor.map(range(3), pool.take(3, "kv") or [])
    for step in (1, 2, 3):
        pool.launched(step)
    tensor.drop([0])
    tensor.drop([1], read_until=2)
    tensor.drop([2], read_until=1)
    for step, left in ((1, 2), (2, 1), (3, 0)):
        pool.finished(step)
        assert pool.num_retiring == left
    pool.check()


def test_the_last_rows_of_a_slot_are_taken_first(pool: ChunkPool) -> None:
    """Who comes next in it begins at row 0, and goes on for as long as nothing is missing."""
    tensor = VirtualTensor(pool, TOTAL, "kv")
    tensor.map(range(TOTAL), pool.take(TOTAL, "kv") or [])
    tensor.drop(range(TOTAL))
    pool.settle()
    pool.take(2, "other")
    assert [tensor.can_adopt(row) for row in range(TOTAL)] == [True] * 4 + [False] * 2
