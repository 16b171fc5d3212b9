"""KV virtual tensors: a slot a sequence, an address range a layer group.

Inside a chunk: `[layer in group][K, V][T tokens][kv heads][head dim]`. The slots of a layer group lie
one after another in one reservation, so that every sequence's token t is found by arithmetic:

    row = 1 + slot * rows_per_slot + t // T        offset = t % T

Row 0 is the guard: one chunk, mapped into every range and never taken away. It keeps the base of
each range a valid pointer (drivers and launchers ask about it), and is where padding may point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.errors import ConfigError
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
        self._slot_rows = [0] * num_slots
        for tensor in self.tensors:
            tensor.alias(0, guard)
        views = [tensor.view(dtype) for tensor in self.tensors]
        self.layer_views = tuple(
            geometry.layer_view(views[layer // geometry.layers_per_group], num_rows, layer)
            for layer in range(geometry.num_layers)
        )

    def first_row(self, slot: int) -> int:
        """The row of the slot's token 0, in every layer group."""
        return 1 + slot * self.rows_per_slot

    def num_rows(self, slot: int) -> int:
        """Rows of the slot that are backed, the same in every layer group."""
        return self._slot_rows[slot]

    def num_warm_rows(self, slot: int, limit: int) -> int:
        """Rows of an empty slot that need no driver call, counted from its beginning up to `limit`."""
        tensor, first = self.tensors[0], self.first_row(slot)
        count = 0
        while count < limit and tensor.can_adopt(first + count):
            count += 1
        return count

    def num_missing(self, growth: Sequence[tuple[int, int]]) -> int:
        """Chunks that slots lack before they can hold so many tokens: (slot, tokens) of each."""
        per_row, rows = self.geometry.tokens_per_chunk, self._slot_rows
        missing = [
            -(-tokens // per_row) - rows[slot] for slot, tokens in growth if tokens > rows[slot] * per_row
        ]
        return self.geometry.num_groups * sum(missing)

    def missing(self, slot: int, num_tokens: int) -> list[tuple[VirtualTensor, int]]:
        """What to back before the slot can hold `num_tokens` tokens."""
        first = self.first_row(slot)
        rows = range(first + self._slot_rows[slot], first + self.geometry.rows_for(num_tokens))
        return [(tensor, row) for row in rows for tensor in self.tensors]

    def grown(self, slot: int, num_tokens: int) -> None:
        """Note that what `missing` named is backed now."""
        self._slot_rows[slot] = max(self._slot_rows[slot], self.geometry.rows_for(num_tokens))

    def clear(self, slot: int) -> None:
        """Let go of everything the slot holds."""
        first = self.first_row(slot)
        for tensor in self.tensors:
            tensor.drop(range(first, first + self._slot_rows[slot]))
        self._slot_rows[slot] = 0
