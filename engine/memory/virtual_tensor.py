"""A reserved address range, contiguous for its reader, backed by chunks on demand (vTensor's VTM).

A row is one chunk's worth of addresses. It is empty, backed by a chunk that this tensor owns, or
left over: still mapped, but its chunk is free and may be stolen, or about to be. Which rows need
backing is decided above; this class maps, and keeps the books of one range.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch

from engine.errors import ConservationError, DriverError
from engine.memory.chunks import ChunkPool


class VirtualTensor:
    """One range of `num_rows` chunks.

    Args:
        chunks: where chunks come from and go back to.
        num_rows: length of the range in chunks.
        owner: label under which its chunks are counted.
    """

    def __init__(self, chunks: ChunkPool, num_rows: int, owner: str) -> None:
        self._chunks = chunks
        self._vm = chunks.vm
        self.num_rows = num_rows
        self.owner = owner
        self.address = self._vm.reserve(num_rows)
        self._backed: dict[int, int] = {}
        self._mapped: dict[int, int] = {}

    @property
    def num_backed(self) -> int:
        """Rows whose chunk this tensor owns or shares."""
        return len(self._backed)

    def is_empty(self, row: int) -> bool:
        """Whether nothing is mapped at the row."""
        return row not in self._mapped

    def can_adopt(self, row: int) -> bool:
        """Whether the row can be backed again by what is still mapped there."""
        return row not in self._backed and row in self._mapped and self._chunks.can_adopt(self._mapped[row])

    def chunk_at(self, row: int) -> int:
        """The chunk that backs a row."""
        return self._backed[row]

    def adopt(self, row: int) -> None:
        """Back a left-over row again; no driver call."""
        chunk = self._mapped[row]
        self._chunks.adopt(chunk, self.owner, (self, row))
        self._backed[row] = chunk

    def map(self, rows: Sequence[int], chunks: Sequence[int]) -> None:
        """Back empty rows with chunks from `ChunkPool.take`, neighbours in one driver call.

        Raises:
            DriverError: nothing stays mapped, and the chunks are still the caller's.
        """
        self._map_at(rows, chunks)
        self._backed.update(zip(rows, chunks, strict=True))

    def alias(self, row: int, chunk: int) -> None:
        """Back an empty row with a chunk that is owned elsewhere. It is read-only from now on."""
        self._map_at([row], [chunk])
        self._chunks.share(chunk)
        self._backed[row] = chunk

    def drop(self, rows: Iterable[int]) -> None:
        """Stop owning rows. They stay mapped for as long as steps in flight may read them."""
        for row in rows:
            self._chunks.drop(self._backed.pop(row), (self, row))

    def unmap_row(self, row: int) -> None:
        """For the pool: the row's chunk leaves it."""
        if row in self._backed:
            raise ConservationError(f"row {row} of {self.owner} is in use and cannot be unmapped")
        self._vm.unmap(self.address + row * self._vm.chunk_bytes, 1)
        del self._mapped[row]

    def view(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole range as one flat tensor. Row 0 must be mapped; holes must not be touched."""
        return self._vm.view(self.address, self.num_rows).view(dtype)

    def _map_at(self, rows: Sequence[int], chunks: Sequence[int]) -> None:
        done: list[tuple[int, int]] = []
        try:
            for begin, end in _runs(rows):
                handles = [self._chunks.handle(chunk) for chunk in chunks[begin:end]]
                self._vm.map(self.address + rows[begin] * self._vm.chunk_bytes, handles)
                done.append((rows[begin], end - begin))
        except DriverError:
            for row, count in done:
                self._vm.unmap(self.address + row * self._vm.chunk_bytes, count)
            raise
        self._mapped.update(zip(rows, chunks, strict=True))


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Index ranges of `rows` in which each row follows the one before it."""
    breaks = [index + 1 for index, (one, two) in enumerate(pairwise(rows)) if two != one + 1]
    edges = [0, *breaks, len(rows)]
    return list(pairwise(edges)) if rows else []
