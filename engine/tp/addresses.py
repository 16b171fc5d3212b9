"""The first rank's addresses, in terms of another rank's."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.errors import ConservationError

Words = npt.NDArray[np.uint64]


class AddressMap:
    """Ranges that exist on both ranks. May be read by one thread while another one adds to it."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, int]] = {}
        self._table: tuple[Words, Words, Words] = _table({})

    def add(self, theirs: int, nbytes: int, ours: int) -> None:
        """A range of the first rank, and where it is here."""
        self._known[theirs] = (nbytes, ours)
        self._table = _table(self._known)

    def remove(self, theirs: int) -> None:
        """A range that is gone."""
        del self._known[theirs]
        self._table = _table(self._known)

    def translate(self, packed: bytes) -> list[int]:
        """Addresses, uint64, into ours; 0 stays 0.

        Raises:
            ConservationError: one of them is in no range.
        """
        theirs = np.frombuffer(packed, np.uint64)
        begins, ends, shifts = self._table
        at = np.searchsorted(begins, theirs, side="right") - 1
        is_known = (at >= 0) & (theirs < ends[np.maximum(at, 0)]) if len(begins) else np.zeros(0, bool)
        if not np.array_equal(is_known, theirs != 0):
            raise ConservationError("the first rank named an address that this rank has not reserved")
        ours: list[int] = np.where(theirs == 0, theirs, theirs + shifts[np.maximum(at, 0)]).tolist()
        return ours


def _table(known: dict[int, tuple[int, int]]) -> tuple[Words, Words, Words]:
    """Begins, ends and differences, wrapped around, in the order of addresses."""
    rows = [
        (theirs, theirs + size, (ours - theirs) % 2**64) for theirs, (size, ours) in sorted(known.items())
    ]
    columns = np.array(rows, np.uint64).reshape(-1, 3).T
    return columns[0], columns[1], columns[2]
