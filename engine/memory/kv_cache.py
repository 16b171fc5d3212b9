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
from dataclasses import dataclass

import torch

from engine.errors import ConfigError, DriverError
from engine.memory.chunks import ChunkPool
from engine.memory.virtual_tensor import VirtualTensor

_MAX_LAYERS_PER_GROUP = 8  # read bandwidth at G = 1, 2, 4, 8, 16: 3.01, 3.00, 3.02, 2.99, 2.95 TB/s (H100)


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """How KV fills chunks.

    Attributes:
        itemsize: bytes of one element.
        layers_per_group: G, consecutive layers that share chunks.
        tokens_per_chunk: T.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    itemsize: int
    chunk_bytes: int
    layers_per_group: int
    tokens_per_chunk: int

    @property
    def num_groups(self) -> int:
        """Layer groups of the model; the last may be partly filled."""
        return -(-self.num_layers // self.layers_per_group)

    @property
    def bytes_per_token(self) -> int:
        """K and V of one token in every layer."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * self.itemsize

    def rows_for(self, num_tokens: int) -> int:
        """Chunks a layer group needs for one sequence of that length."""
        return -(-num_tokens // self.tokens_per_chunk)

    def chunks_for(self, num_tokens: int) -> int:
        """Chunks all layer groups need for one sequence of that length."""
        return self.num_groups * self.rows_for(num_tokens)

    def layer_view(self, memory: torch.Tensor, num_rows: int, layer: int) -> torch.Tensor:
        """One layer as (rows, 2, T, kv_heads, head_dim) over the memory of its group, row after row.

        Args:
            memory: at least `num_rows` chunks, flat, in the type of keys and values.
        """
        token = self.num_kv_heads * self.head_dim
        half = self.tokens_per_chunk * token
        size = (num_rows, 2, self.tokens_per_chunk, self.num_kv_heads, self.head_dim)
        stride = (self.chunk_bytes // self.itemsize, half, token, self.head_dim, 1)
        return memory.as_strided(size, stride, layer % self.layers_per_group * 2 * half)

    @classmethod
    def choose(
        cls,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        itemsize: int,
        chunk_bytes: int,
        layers_per_group: int | None = None,
        min_tokens: int = 128,
    ) -> KvGeometry:
        """G and T by rule: as many layers as cost no read bandwidth (8) while a chunk still holds
        `min_tokens` tokens (128 is the widest tile of the attention kernels, and a tile must not
        straddle chunks), unless that wastes over 3 % more of each chunk than the best choice. More
        layers a chunk mean less waste in the last chunk of each sequence.

        Raises:
            ConfigError: if a chunk cannot hold one token.
        """
        sizes = (num_layers, num_kv_heads, head_dim, itemsize, chunk_bytes)
        if layers_per_group is not None:
            options = [cls._fit(*sizes, layers_per_group)]
        else:
            options = [
                cls._fit(*sizes, group) for group in range(1, min(_MAX_LAYERS_PER_GROUP, num_layers) + 1)
            ]
        options = [option for option in options if option.tokens_per_chunk]
        if not options:
            raise ConfigError(
                f"a chunk of {chunk_bytes} bytes cannot hold one token's keys and values: "
                "raise memory.chunk_bytes"
            )
        wide = [option for option in options if option.tokens_per_chunk >= min_tokens] or options[:1]
        best = max(option._filled for option in wide)
        good = [option for option in wide if option._filled >= best - 0.03]
        return max(good, key=lambda o: (o.tokens_per_chunk % 64 == 0, o.layers_per_group))

    @property
    def _filled(self) -> float:
        return self.bytes_per_token * self.tokens_per_chunk / (self.num_groups * self.chunk_bytes)

    @classmethod
    def _fit(
        cls, num_layers: int, num_kv_heads: int, head_dim: int, itemsize: int, chunk_bytes: int, group: int
    ) -> KvGeometry:
        """T for one G: a multiple of 64, or of 16, if that costs little, so that tiles divide it."""
        tokens = chunk_bytes // (group * 2 * num_kv_heads * head_dim * itemsize)
        for multiple in (64, 16):
            rounded = tokens // multiple * multiple
            if rounded >= 0.92 * tokens and rounded:
                tokens = rounded
                break
        return cls(num_layers, num_kv_heads, head_dim, itemsize, chunk_bytes, group, tokens)


class KvCache:
    """The KV of every sequence that holds a slot.

    Args:
        chunks: the pool.
        geometry: how KV fills chunks.
        num_slots: sequences at once.
        max_tokens: longest sequence; address space is reserved for it in every slot.
        dtype: of keys and values.
        guard: the chunk behind row 0 of every range.
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
        views = [tensor.view(dtype) for tensor in self.tensors]
        self.layer_views = tuple(
            geometry.layer_view(views[layer // geometry.layers_per_group], num_rows, layer)
            for layer in range(geometry.num_layers)
        )
        self._rows = tuple(view.view(torch.uint8).view(num_rows, geometry.chunk_bytes) for view in views)

    def first_row(self, slot: int) -> int:
        """The row of the slot's token 0, in every layer group."""
        return 1 + slot * self.rows_per_slot

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

    def copy_rows(self, source: int, target: int) -> None:
        """Copy a row of every layer group on the device, in the order of the current stream."""
        for rows in self._rows:
            rows[target].copy_(rows[source])
