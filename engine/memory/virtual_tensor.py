"""A reserved address range, contiguous for its reader, backed by chunks on demand (vTensor's VTM).

A row is one chunk's worth of addresses. It is empty, backed by a chunk that this tensor owns, or
left over: still mapped, but its chunk is free and may be stolen, or about to be. While the mapping
thread is at a row, it is none of these. Which rows need backing is decided above; this class keeps
the books of one range.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from engine.errors import ConservationError
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
        self._awaited: set[int] = set()

    @property
    def num_backed(self) -> int:
        """Rows whose chunk this tensor owns or shares."""
        return len(self._backed)

    def address_of(self, row: int) -> int:
        """Where a row begins."""
        return self.address + row * self._vm.chunk_bytes

    def is_empty(self, row: int) -> bool:
        """Whether nothing is mapped at the row, nor about to be."""
        return row not in self._mapped and row not in self._awaited

    def is_awaited(self, row: int) -> bool:
        """Whether the mapping thread is at the row."""
        return row in self._awaited

    def can_adopt(self, row: int) -> bool:
        """Whether the row can be backed again by what is still mapped there."""
        return row not in self._backed and row in self._mapped and self._chunks.can_adopt(self._mapped[row])

    def mapped_at(self, row: int) -> int | None:
        """The chunk that is mapped at a row, backing it or left over."""
        return self._mapped.get(row)

    def chunk_at(self, row: int) -> int:
        """The chunk that backs a row."""
        return self._backed[row]

    def adopt(self, row: int) -> None:
        """Back a left-over row again; no driver call."""
        chunk = self._mapped[row]
        self._chunks.adopt(chunk, self.owner, (self, row))
        self._backed[row] = chunk

    def map(self, rows: Sequence[int], chunks: Sequence[int]) -> None:
        """Back empty rows with chunks from `ChunkPool.take`.

        Raises:
            DriverError: nothing stays mapped, and the chunks are still the caller's.
        """
        self._chunks.map([(self, row) for row in rows], chunks)
        for row in rows:
            self.back(row)

    def back(self, row: int) -> None:
        """Count a row that `ChunkPool.map` has mapped as this tensor's own."""
        self._backed[row] = self._mapped[row]

    def alias(self, rows: Sequence[int], chunks: Sequence[int]) -> None:
        """Back empty rows with chunks that are owned elsewhere. They are read-only from now on.

        Raises:
            DriverError: nothing stays mapped.
        """
        self._chunks.map([(self, row) for row in rows], chunks)
        for row, chunk in zip(rows, chunks, strict=True):
            self._chunks.share(chunk)
            self._backed[row] = chunk

    def drop(self, rows: Iterable[int], read_until: int | None = None) -> None:
        """Stop owning rows. They stay mapped for as long as steps in flight may read them: until the
        step `read_until` has finished, or the newest launched.
        """
        for row in rows:
            self._chunks.drop(self._backed.pop(row), (self, row), read_until)

    def mapped(self, row: int, chunk: int) -> None:
        """For the pool: a chunk has been mapped at the row."""
        self._mapped[row] = chunk

    def unmapped(self, row: int) -> None:
        """For the pool: the row's chunk has left it, or did not come."""
        if row in self._backed:
            raise ConservationError(f"row {row} of {self.owner} is in use and cannot be unmapped")
        self._mapped.pop(row, None)
        self._awaited.discard(row)

    def awaits(self, row: int) -> None:
        """For the pool: the mapping thread is at the row."""
        self._awaited.add(row)

    def view(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole range as one flat tensor. Row 0 must be mapped; holes must not be touched."""
        return self._vm.view(self.address, self.num_rows).view(dtype)
