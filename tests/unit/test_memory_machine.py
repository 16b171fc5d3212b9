"""Random growth, sharing, release, trim, limits, mapping ahead, steps in flight; conservation after each."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.memory.chunks import ChunkPool
from engine.memory.host_vmm import HostVirtualMemory
from engine.memory.virtual_tensor import VirtualTensor

CHUNK = 4096
TOTAL = 12
ROWS = 8


class MemoryMachine(RuleBasedStateMachine):
    """A model of three tensors over one pool: what each backed row must contain."""

    def __init__(self) -> None:
        super().__init__()
        self.vm = HostVirtualMemory(CHUNK, TOTAL)
        self.pool = ChunkPool(self.vm, TOTAL)
        self.tensors = [VirtualTensor(self.pool, ROWS, f"owner{index}") for index in range(3)]
        self.views: dict[int, torch.Tensor] = {}
        self.content: dict[tuple[int, int], int] = {}
        self.reading: list[tuple[int, dict[tuple[int, int], int]]] = []
        self.held: set[tuple[int, int]] = set()
        self.limit = TOTAL
        self.stamp = 0
        self.step = 0

    def _row(self, where: tuple[int, int]) -> torch.Tensor:
        tensor, row = where
        return self.vm.view(self.tensors[tensor].address + row * CHUNK, 1)

    def _write(self, where: tuple[int, int]) -> None:
        self.stamp = self.stamp % 250 + 1
        self._row(where).fill_(self.stamp)
        self.content[where] = self.stamp

    @rule(
        tensor=st.integers(0, 2), rows=st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=4, unique=True)
    )
    def grow(self, tensor: int, rows: list[int]) -> None:
        target = self.tensors[tensor]
        empty = sorted(row for row in rows if target.is_empty(row))
        chunks = self.pool.take(len(empty), target.owner)
        if chunks is None:
            assert len(empty) > self.pool.num_free
            return
        target.map(empty, chunks)
        for row in empty:
            self._write((tensor, row))

    @rule(tensor=st.integers(0, 2), row=st.integers(0, ROWS - 1))
    def adopt(self, tensor: int, row: int) -> None:
        target = self.tensors[tensor]
        if target.can_adopt(row):
            target.adopt(row)
            if not any((tensor, row) in rows for _, rows in self.reading):
                self._write((tensor, row))
            else:
                self.content[(tensor, row)] = int(self._row((tensor, row))[0])

    @precondition(lambda self: self.content)
    @rule(data=st.data(), to=st.integers(0, 2), row=st.integers(0, ROWS - 1))
    def alias(self, data: st.DataObject, to: int, row: int) -> None:
        source = data.draw(st.sampled_from(sorted(self.content)))
        if self.tensors[to].is_empty(row):
            self.tensors[to].alias([row], [self.tensors[source[0]].chunk_at(source[1])])
            self.content[(to, row)] = self.content[source]

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        tensor, row = data.draw(st.sampled_from(sorted(self.content)))
        read_until = max((step for step, rows in self.reading if (tensor, row) in rows), default=0)
        self.tensors[tensor].drop([row], data.draw(st.sampled_from([None, read_until])))
        self.pool.settle()
        del self.content[(tensor, row)]

    @rule(
        tensor=st.integers(0, 2),
        rows=st.lists(st.integers(0, ROWS - 1), max_size=4, unique=True),
        is_held=st.booleans(),
    )
    def send_ahead(self, tensor: int, rows: list[int], is_held: bool) -> None:
        target, free = self.tensors[tensor], self.pool.num_free
        held = [where for where in self.held if self.tensors[where[0]].can_adopt(where[1])]
        self.pool.send_ahead([(target, row) for row in rows if target.is_empty(row)], is_held)
        assert self.pool.num_free == free, "a chunk on its way is free"
        assert all(self.tensors[t].can_adopt(row) for t, row in held), "what is held stays where it is"

    @rule(where=st.sets(st.tuples(st.integers(0, 2), st.integers(0, ROWS - 1)), max_size=6))
    def hold(self, where: set[tuple[int, int]]) -> None:
        mapped = {(t, row): self.tensors[t].mapped_at(row) for t, row in where}
        self.held = {
            place for place, chunk in mapped.items() if chunk is not None and place not in self.content
        }
        self.pool.hold({chunk for chunk in mapped.values() if chunk is not None})
        assert 0 <= self.pool.num_free - self.pool.num_spare <= len(where) + self.pool.num_sent

    @rule(wait=st.booleans())
    def receive(self, wait: bool) -> None:
        self.pool.receive(wait)
        assert not wait or self.pool.num_sent == 0

    @rule()
    def launch(self) -> None:
        """A step that reads everything backed now starts on the device."""
        self.step += 1
        self.pool.launched(self.step)
        self.reading.append((self.step, dict(self.content)))

    @precondition(lambda self: self.reading)
    @rule()
    def finish(self) -> None:
        """The oldest step in flight reads its rows, at the last moment, and ends."""
        step, rows = self.reading.pop(0)
        for where, stamp in rows.items():
            assert int(self._row(where)[0]) == stamp, "changed under a step in flight"
        self.pool.finished(step)

    @rule()
    def trim(self) -> None:
        free, total = self.pool.num_free, self.pool.total
        self.pool.trim()
        assert self.pool.num_free == free
        assert self.pool.num_created == self.pool.total - self.pool.num_unowned <= total - max(0, free)
        assert self.pool.num_sent == 0

    @rule(limit=st.one_of(st.none(), st.integers(0, TOTAL)))
    def restrict(self, limit: int | None) -> None:
        """Less than is owned, or more again: what is free beyond it goes back at once."""
        self.limit = TOTAL if limit is None else limit
        self.pool.budget.restrict(limit)
        self.pool.give_back()
        self._assert_given_back()

    @rule()
    def give_back(self) -> None:
        self.pool.settle()
        self.pool.give_back()
        self._assert_given_back()

    def _assert_given_back(self) -> None:
        assert self.pool.budget.num_excess == max(0, self.pool.total - self.limit)
        assert not self.pool.budget.num_excess or self.pool.num_unowned == 0, "free chunks were kept"

    @invariant()
    def nothing_is_lost(self) -> None:
        self.pool.check()
        owned = len({self.tensors[t].chunk_at(row) for t, row in self.content})
        assert self.pool.num_unowned + owned + self.pool.num_retiring == self.pool.total
        assert self.limit <= self.pool.total <= TOTAL

    @invariant()
    def content_is_what_was_written(self) -> None:
        for where, stamp in self.content.items():
            view = self._row(where)
            assert int(view[0]) == stamp
            assert int(view[-1]) == stamp

    def teardown(self) -> None:
        self.vm.close()


MemoryMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestMemoryMachine = MemoryMachine.TestCase
