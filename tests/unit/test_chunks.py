"""When dropped chunks are free, and in which order."""

from __future__ import annotations

from engine.memory.chunks import ChunkPool
from engine.memory.host_vmm import HostVirtualMemory
from engine.memory.virtual_tensor import VirtualTensor

CHUNK = 4096
TOTAL = 6


def test_what_an_earlier_step_reads_does_not_wait_for_a_later_one() -> None:
    pool = ChunkPool(HostVirtualMemory(CHUNK, TOTAL), TOTAL)
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


def test_the_last_rows_of_a_slot_are_taken_first() -> None:
    """Who comes next in it begins at row 0, and goes on for as long as nothing is missing."""
    pool = ChunkPool(HostVirtualMemory(CHUNK, TOTAL), TOTAL)
    tensor = VirtualTensor(pool, TOTAL, "kv")
    tensor.map(range(TOTAL), pool.take(TOTAL, "kv") or [])
    tensor.drop(range(TOTAL))
    pool.settle()
    pool.take(2, "other")
    assert [tensor.can_adopt(row) for row in range(TOTAL)] == [True] * 4 + [False] * 2
