"""How KV fills chunks, and what a pass sees of it: one view a layer over the ranges of its layer groups.

Inside a chunk: `[layer in group][K, V][T tokens][kv heads][head dim]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.errors import ConfigError

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


class KvViews:
    """The KV of every slot, as kernels see it.

    Args:
        geometry: how KV fills chunks.
        rows_per_slot: chunks of address space that a slot has in each layer group.
        groups: the range of each layer group, flat, in the type of keys and values.

    Attributes:
        layer_views: (rows, 2, T, kv_heads, head_dim) of each layer.
    """

    def __init__(self, geometry: KvGeometry, rows_per_slot: int, groups: Sequence[torch.Tensor]) -> None:
        self.rows_per_slot = rows_per_slot
        num_rows = groups[0].nbytes // geometry.chunk_bytes
        self.layer_views = tuple(
            geometry.layer_view(groups[layer // geometry.layers_per_group], num_rows, layer)
            for layer in range(geometry.num_layers)
        )
        self._rows = tuple(group.view(torch.uint8).view(num_rows, geometry.chunk_bytes) for group in groups)

    def first_row(self, slot: int) -> int:
        """The row of the slot's token 0, in every layer group."""
        return 1 + slot * self.rows_per_slot

    def copy_rows(self, source: int, target: int) -> None:
        """Copy a row of every layer group on the device, in the order of the current stream."""
        for rows in self._rows:
            rows[target].copy_(rows[source])
