"""KV virtual tensors: a slot a sequence, an address range a layer group.

Inside a chunk: `[layer in group][K, V][T tokens][kv heads][head dim]`. The slots of a layer group lie
one after another in one reservation, so that every sequence's token t is found by arithmetic:

    row = 1 + slot * rows_per_slot + t // T        offset = t % T

A sequence that reads its first tokens through another slot has nothing in its own first rows.

Row 0 is the guard: one chunk, mapped into every range and never taken away. It keeps the base of
each range a valid pointer (drivers and launchers ask about it), and is where padding may point.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.errors import DriverError
from engine.memory.chunks import ChunkPool
from engine.memory.kv_geometry import KvGeometry, KvViews
from engine.memory.virtual_tensor import VirtualTensor


class KvCache:
    """The KV of every sequence that holds a slot.

    Args:
        chunks: the pool.
        geometry: how KV fills chunks.
        num_slots: sequences at once.
        max_tokens: longest sequence; address space is reserved for it in every slot.
        dtype: of keys and values.
        guard: the chunk behind row 0 of every range.

    Attributes:
        layer_views, copy_rows, first_row: those of `KvViews`.
    """

    def __init__(
        self,
        chunks: ChunkPool,
        geometry: KvGeometry,
        num_slots: int,
        max_tokens: int,
        dtype: torch.dtype,
        guard: int,
    ) -> None:
        self.geometry = geometry
        self.num_slots = num_slots
        self.rows_per_slot = geometry.rows_for(max_tokens)
        num_rows = 1 + num_slots * self.rows_per_slot
        self.tensors = tuple(VirtualTensor(chunks, num_rows, "kv") for _ in range(geometry.num_groups))
        self._begin = [0] * num_slots  # own rows of a slot: from here ..
        self._end = [0] * num_slots  # .. to here
        self._highest = [0] * num_slots  # the furthest `_end` since a slot was opened
        self._absent: dict[
            int, dict[int, int]
        ] = {}  # slot -> layer group -> from which row on nothing is there
        for tensor in self.tensors:
            tensor.alias([0], [guard])
        views = KvViews(geometry, self.rows_per_slot, [tensor.view(dtype) for tensor in self.tensors])
        self.layer_views, self.copy_rows, self.first_row = views.layer_views, views.copy_rows, views.first_row

    def end(self, slot: int) -> int:
        """Where the slot's backed rows end, counted from its first, the same in every layer group."""
        return self._end[slot]

    def num_own_chunks(self, slot: int) -> int:
        """Chunks behind the slot's own rows, those it shares with other slots included."""
        return self.geometry.num_groups * (self._end[slot] - self._begin[slot])

    def open(self, slot: int, begin: int) -> None:
        """Start an empty slot whose own rows begin at `begin`."""
        self._begin[slot] = self._end[slot] = self._highest[slot] = begin

    def num_warm_rows(self, slot: int, begin: int, end: int) -> int:
        """Rows from `begin` up to `end` of an empty slot that need no driver call, or whose call is on its
        way, up to a gap.
        """
        tensor, first = self.tensors[-1], self.first_row(slot)
        count = begin
        while count < end and (tensor.can_adopt(first + count) or tensor.is_awaited(first + count)):
            count += 1
        return count - begin

    def empty_places(self, slot: int, num_rows: int) -> list[tuple[VirtualTensor, int]]:
        """Where nothing is mapped, nor about to be, in an empty slot's first rows."""
        first = self.first_row(slot)
        rows = range(first, first + num_rows)
        return [(tensor, row) for row in rows for tensor in self.tensors if tensor.is_empty(row)]

    def num_missing(self, growth: Sequence[tuple[int, int]]) -> int:
        """Chunks that slots lack before they can hold so many tokens: (slot, tokens) of each."""
        per_row, end = self.geometry.tokens_per_chunk, self._end
        missing = [
            -(-tokens // per_row) - end[slot] for slot, tokens in growth if tokens > end[slot] * per_row
        ]
        return self.geometry.num_groups * sum(missing)

    def missing(self, slot: int, num_tokens: int) -> list[tuple[VirtualTensor, int]]:
        """What to back before the slot can hold `num_tokens` tokens."""
        first = self.first_row(slot)
        rows = range(first + self._end[slot], first + self.geometry.rows_for(num_tokens))
        return [(tensor, row) for row in rows for tensor in self.tensors]

    def grown(self, slot: int, num_tokens: int) -> None:
        """Note that what `missing` named is backed now."""
        self._end[slot] = max(self._end[slot], self.geometry.rows_for(num_tokens))
        self._highest[slot] = max(self._highest[slot], self._end[slot])

    def alias(self, slot: int, from_slot: int, count: int) -> None:
        """Map the next `count` rows of another slot into this one too, at the same tokens.

        Raises:
            DriverError: nothing has changed.
        """
        at = self._end[slot]
        rows = range(self.first_row(slot) + at, self.first_row(slot) + at + count)
        there = range(self.first_row(from_slot) + at, self.first_row(from_slot) + at + count)
        for done, tensor in enumerate(self.tensors):
            try:
                tensor.alias(rows, [tensor.chunk_at(row) for row in there])
            except DriverError:
                for other in self.tensors[:done]:
                    other.drop(rows, read_until=0)  # no step has seen them
                raise
        self._end[slot] += count
        self._highest[slot] = self._end[slot]

    def can_alias(self, slot: int, begin: int, end: int) -> bool:
        """Whether nothing is mapped at these rows of an empty slot."""
        rows = range(self.first_row(slot) + begin, self.first_row(slot) + end)
        return all(tensor.is_empty(row) for tensor in self.tensors for row in rows)

    def cut(self, slot: int, end: int, read_until: int | None = None) -> None:
        """Let go of the slot's rows from `end` on, which no step after `read_until` reads."""
        first, old, absent = self.first_row(slot), self._end[slot], self._absent.get(slot, {})
        new = self._end[slot] = min(max(end, self._begin[slot]), old)
        for group, tensor in enumerate(self.tensors):
            tensor.drop(range(first + new, first + min(old, absent.get(group, old))), read_until)
        for group in [group for group, begin in absent.items() if begin >= new]:
            del absent[group]
        if not absent:
            self._absent.pop(slot, None)

    def leave(self, slot: int, group: int, begin: int, read_until: int | None = None) -> None:
        """Let go of the slot's rows from `begin` on in one layer group, until `returned`. The slot keeps
        its end: it is parked, and reads nothing until they are there again.
        """
        first = self.first_row(slot)
        self.tensors[group].drop(range(first + begin, first + self._end[slot]), read_until)
        self._absent.setdefault(slot, {})[group] = begin

    def absent(self, slot: int) -> list[tuple[VirtualTensor, int]]:
        """What to back before a parked slot can be read again, layer group after layer group."""
        first, end = self.first_row(slot), self._end[slot]
        absent = sorted(self._absent.get(slot, {}).items())
        return [
            (self.tensors[group], row) for group, begin in absent for row in range(first + begin, first + end)
        ]

    def all_absent(self, slot: int, num_rows: int) -> None:
        """Note that an empty slot will be read up to there once all of it has been backed."""
        self._end[slot] = self._highest[slot] = num_rows
        self._absent[slot] = dict.fromkeys(range(self.geometry.num_groups), 0)

    def returned(self, slot: int) -> None:
        """Note that what `absent` named is backed now."""
        self._absent.pop(slot, None)

    def used_rows(self, slot: int) -> tuple[int, int]:
        """Own rows that the slot has had since it was opened: from, to."""
        return self._begin[slot], self._highest[slot]
