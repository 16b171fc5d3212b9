"""A million random operations on chunks and virtual tensors: nothing is lost, and every row holds its own.

`test_memory_machine.py` finds the smallest case; this one runs long enough for states that need hundreds
of steps to come about. The model beside the pool knows which chunk is at which place and what was
written into it. Chunks keep their number and their content until they are released, so each row that a
sequence or a step in flight may read is compared with its chunk's pattern.
"""

from __future__ import annotations

import ctypes
import logging
import random

import pytest

from engine.memory.chunks import ChunkPool
from engine.memory.host_vmm import HostVirtualMemory
from engine.memory.virtual_tensor import VirtualTensor

CHUNK = 4096
ROWS = 24
MAX_CHUNKS = 44  # that the driver has; the budget is sometimes larger, so that it refuses
OPERATIONS = 1_000_000
CHECK_EVERY = 400

Where = tuple[VirtualTensor, int]


class Stress:
    """Three tensors over one pool, and what must be at each of their rows.

    Attributes:
        chunk_at: the chunk at each backed place.
        references: how many places each owned chunk has.
        stamps: the byte that fills each chunk that was written.
        last_read: the newest step that reads a place.
        dropped: places given up: until when they are read, and what is there.
        in_flight: steps, each with what it reads: (place, byte that fills it).
    """

    def __init__(self, seed: int, vm: HostVirtualMemory) -> None:
        self.dice = random.Random(seed)
        self.vm = vm
        self.pool = ChunkPool(vm, MAX_CHUNKS)
        self.tensors = [VirtualTensor(self.pool, ROWS, f"owner{index}") for index in range(3)]
        self.chunk_at: dict[Where, int] = {}
        self.references: dict[int, int] = {}
        self.stamps: dict[int, int] = {}
        self.last_read: dict[Where, int] = {}
        self.dropped: dict[Where, tuple[int, int]] = {}
        self.in_flight: list[tuple[int, list[tuple[Where, int]]]] = []
        self.patterns = [bytes([value]) * CHUNK for value in range(256)]
        self.budget = MAX_CHUNKS
        self.step = self.num_finished = self.num_operations = 0
        often = [self.grow] * 4 + [self.adopt] * 4 + [self.drop] * 8 + [self.alias] * 3
        beside = [self.send_ahead] * 2 + [self.receive] * 2
        steps = [self.launch] * 3 + [self.finish] * 4
        self.operations = (often + beside + steps + [self.take_and_put_back]) * 8 + [self.trim, self.rebudget]

    def run(self, operations: int) -> None:
        choose, pool = self.dice.choice, self.pool
        while self.num_operations < operations:
            for _ in range(CHECK_EVERY):
                choose(self.operations)()
                if pool.num_free + len(self.references) + pool.num_retiring != pool.total:
                    raise AssertionError(f"a chunk is lost after {self.num_operations} operations")
            self.check()

    def check(self) -> None:
        """Everything, at the cost of some hundred operations."""
        self.pool.settle()
        self.pool.check()
        waiting = {chunk for step, chunk in self.dropped.values() if step > self.num_finished}
        assert self.pool.num_retiring == len(waiting - self.references.keys()), "who waits, and who need not"
        assert self.pool.total + self.pool.num_refused == self.budget
        assert sum(tensor.num_backed for tensor in self.tensors) == len(self.chunk_at)
        for where, chunk in self.chunk_at.items():
            self.compare(where, self.stamps[chunk])

    def compare(self, where: Where, stamp: int) -> None:
        found = ctypes.string_at(where[0].address_of(where[1]), CHUNK)
        assert found == self.patterns[stamp], f"row {where[1]} of {where[0].owner}: {found[0]}, not {stamp}"

    def grow(self) -> None:
        tensor, rows = self._some_empty()
        if not rows:
            return
        self.num_operations += 1
        chunks = self.pool.take(len(rows), tensor.owner)
        if chunks is None:
            assert len(rows) > self.pool.num_free, "a shortage that is none"
            return
        tensor.map(rows, chunks)
        for row, chunk in zip(rows, chunks, strict=True):
            self._own((tensor, row), chunk)
            self._write(chunk, tensor.address_of(row))

    def take_and_put_back(self) -> None:
        self.num_operations += 1
        chunks = self.pool.take(self.dice.randrange(4), "nobody")
        if chunks is not None:
            self.pool.put_back(chunks)
        assert self.pool.num_owned("nobody") == 0

    def adopt(self) -> None:
        tensor, row = where = self._anywhere()
        if not tensor.can_adopt(row):
            return
        self.num_operations += 1
        tensor.adopt(row)
        chunk = tensor.chunk_at(row)
        assert chunk not in self.references
        self.dropped.pop(where, None)
        if chunk in self.stamps:
            self.compare(where, self.stamps[chunk])
        self._own(where, chunk)
        # The device would do this after the steps that read the row; here it would happen before.
        if chunk not in self.stamps or not self._is_read(where):
            self._write(chunk, tensor.address_of(row))

    def alias(self) -> None:
        tensor, row = self._anywhere()
        source = self._somewhere_backed()
        if source is None or not tensor.is_empty(row):
            return
        self.num_operations += 1
        chunk = self.chunk_at[source]
        tensor.alias([row], [chunk])
        self._own((tensor, row), chunk)
        self.compare((tensor, row), self.stamps[chunk])

    def drop(self) -> None:
        where = self._somewhere_backed()
        if where is None:
            return
        self.num_operations += 1
        chunk = self.chunk_at.pop(where)
        self.references[chunk] -= 1
        if not self.references[chunk]:
            del self.references[chunk]
        read_until = self.last_read.get(where, 0) if self.dice.random() < 0.5 else None
        self.dropped[where] = (self.step if read_until is None else read_until, chunk)
        where[0].drop([where[1]], read_until)
        if self.dice.random() < 0.8:
            self.pool.settle()

    def send_ahead(self) -> None:
        tensor, rows = self._some_empty()
        if not rows:
            return
        self.num_operations += 1
        free = self.pool.num_free
        self.pool.send_ahead([(tensor, row) for row in rows])
        assert self.pool.num_free == free, "a chunk on its way is free"

    def receive(self) -> None:
        self.num_operations += 1
        wait = self.dice.random() < 0.3
        self.pool.receive(wait)
        assert not wait or self.pool.num_sent == 0

    def launch(self) -> None:
        """A step that reads everything backed now."""
        self.num_operations += 1
        self.step += 1
        self.pool.launched(self.step)
        stamps = self.stamps
        self.in_flight.append((self.step, [(at, stamps[chunk]) for at, chunk in self.chunk_at.items()]))
        self.last_read.update(dict.fromkeys(self.chunk_at, self.step))
        if len(self.in_flight) > 3:
            self.finish()

    def finish(self) -> None:
        """The oldest step in flight reads some of its rows, at the last moment, and ends."""
        if not self.in_flight:
            return
        self.num_operations += 1
        step, reads = self.in_flight.pop(0)
        for where, stamp in self.dice.choices(reads, k=2) if reads else ():
            self.compare(where, stamp)
        self.num_finished = step
        self.pool.finished(step)

    def trim(self) -> None:
        self.num_operations += 1
        free = self.pool.num_free + self.pool.num_refused
        self.pool.trim()
        assert self.pool.num_free + self.pool.num_refused == free  # what was to be made may be refused now
        assert self.pool.num_created == self.pool.total - self.pool.num_free
        assert self.pool.num_sent == 0

    def rebudget(self) -> None:
        """Less than there is, or more than the driver has: then some are refused, and asked for again."""
        self.num_operations += 1
        if self.dice.random() < 0.5:
            self.pool.ask_again()
            assert self.pool.num_refused == 0
        else:
            self.pool.resize(self.dice.randint(MAX_CHUNKS // 2, MAX_CHUNKS + 4) - self.pool.num_refused)
            self.budget = self.pool.total + self.pool.num_refused

    def _anywhere(self) -> Where:
        at = int(self.dice.random() * 3 * ROWS)
        return self.tensors[at // ROWS], at % ROWS

    def _some_empty(self) -> tuple[VirtualTensor, list[int]]:
        tensor, row = self._anywhere()
        return tensor, [at for at in range(row, min(row + 2, ROWS)) if tensor.is_empty(at)]

    def _somewhere_backed(self) -> Where | None:
        where = self._anywhere()
        return where if where in self.chunk_at else None

    def _own(self, where: Where, chunk: int) -> None:
        self.chunk_at[where] = chunk
        self.references[chunk] = self.references.get(chunk, 0) + 1

    def _is_read(self, where: Where) -> bool:
        return bool(self.in_flight) and self.last_read.get(where, 0) >= self.in_flight[0][0]

    def _write(self, chunk: int, address: int) -> None:
        self.stamps[chunk] = stamp = 1 + int(self.dice.random() * 255)
        ctypes.memset(address, stamp, CHUNK)


def test_a_million_operations(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)  # each refusal is logged
    vm = HostVirtualMemory(CHUNK, MAX_CHUNKS)
    stress = Stress(7, vm)
    stress.run(OPERATIONS)
    while stress.in_flight:
        stress.finish()
    for tensor, row in list(stress.chunk_at):
        tensor.drop([row])
    stress.pool.settle()
    stress.pool.trim()
    stress.pool.check()
    assert (stress.pool.num_created, stress.pool.num_free) == (0, stress.pool.total)
    vm.close()


def test_that_the_device_has_no_more_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """It is asked for again all the time, since it may come back."""
    vm = HostVirtualMemory(CHUNK, 6)
    pool = ChunkPool(vm, 8)
    for _ in range(3):
        pool.create_all()
        assert (pool.total, pool.num_refused) == (6, 2)
        pool.ask_again()
    assert caplog.text.count("the pool shrinks from 8 to 6 chunks") == 1
    pool.trim()
    vm.create(1)  # somebody else's
    pool.create_all()
    assert caplog.text.count("the pool shrinks from 8 to 5 chunks") == 1
