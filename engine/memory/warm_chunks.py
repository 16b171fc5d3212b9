"""Free chunks that are still mapped: where they were last used, or where they will be needed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from itertools import chain, islice
from typing import Protocol


class Range(Protocol):
    """What the pool needs of a virtual tensor: places where chunks are mapped, one a row."""

    def address_of(self, row: int) -> int: ...

    def mapped(self, row: int, chunk: int) -> None: ...

    def unmapped(self, row: int) -> None: ...

    def awaits(self, row: int) -> None: ...


Place = tuple[Range, int]


class WarmChunks:
    """Free chunks by the place that maps them, in the order in which others may take them: the least
    recently used first, and last those held where a running sequence is about to grow.

    In a pool full of cached prefixes nearly all that is free at a time is what was mapped ahead. Without
    the order a prompt took just that, and the decodes it was meant for called the driver: one in 13
    decode steps of a mixed load (replayed).
    """

    def __init__(self) -> None:
        self._spare: OrderedDict[int, Place] = OrderedDict()
        self._held: dict[int, Place] = {}

    def __len__(self) -> int:
        return len(self._spare) + len(self._held)

    def __contains__(self, chunk: int) -> bool:
        return chunk in self._spare or chunk in self._held

    @property
    def num_held(self) -> int:
        """Those taken last."""
        return len(self._held)

    def add(self, chunk: int, place: Place, is_held: bool = False) -> None:
        """A chunk is free from now on, and mapped there."""
        (self._held if is_held else self._spare)[chunk] = place

    def pop(self, chunk: int) -> Place:
        """A chunk is not free, or not mapped, any more; where it was."""
        return self._held.pop(chunk) if chunk in self._held else self._spare.pop(chunk)

    def pop_spare(self) -> tuple[int, Place] | None:
        """The chunk used least recently, if any is not held."""
        return self._spare.popitem(last=False) if self._spare else None

    def first(self, count: int) -> list[tuple[int, Place]]:
        """The `count` chunks that others may take first."""
        return list(islice(chain(self._spare.items(), self._held.items()), count))

    def hold(self, chunks: Collection[int]) -> None:
        """Hold these from now on, where they are warm, and no others."""
        for chunk in [chunk for chunk in self._held if chunk not in chunks]:
            self._spare[chunk] = self._held.pop(chunk)
        for chunk in chunks:
            if chunk in self._spare:
                self._held[chunk] = self._spare.pop(chunk)

    def chunks(self) -> set[int]:
        """All of them."""
        return {*self._spare, *self._held}
