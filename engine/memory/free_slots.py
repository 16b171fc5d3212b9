"""Slots that nobody has, and what is still mapped in them."""

from __future__ import annotations

from engine.memory.kv_cache import KvCache


class FreeSlots:
    """Empty slots, chosen by best fit (eLLM): the fewest warm rows that still cover a sequence."""

    def __init__(self, kv: KvCache) -> None:
        self._kv = kv
        self._empty = list(range(kv.num_slots))[::-1]
        self._warm: dict[int, tuple[int, int]] = {}  # bounds: rows may have been stolen since

    def __len__(self) -> int:
        return len(self._empty) + len(self._warm)

    def put(self, slot: int) -> None:
        """Take a slot in; the rows it has just let go of are still mapped."""
        begin, end = self._kv.used_rows(slot)
        if begin < end:
            self._warm[slot] = (begin, end)
        else:
            self._empty.append(slot)

    def take_empty(self) -> int | None:
        """A slot with nothing mapped in it, while there are others."""
        if len(self) > 1:
            for at in reversed(range(len(self._empty))):
                if self._kv.can_alias(self._empty[at], 0, self._kv.rows_per_slot):
                    return self._empty.pop(at)
        return None

    def take(self, begin: int, end: int) -> int | None:
        """A slot for a sequence whose own rows are `begin` to `end`; None if there is none."""
        slot = self._covering(begin, end)
        if slot is None and self._warm:
            # None covers it all. One with nothing mapped leaves the warm rows to those they fit; without
            # such a one, the most overlap saves the most.
            slot = max(self._warm, key=lambda s: self._overlap(s, begin, end))
            if not self._overlap(slot, begin, end) and self._empty:
                slot = None
        if slot is None:
            return self._empty.pop() if self._empty else None
        del self._warm[slot]
        return slot

    def spare(self, num_rows: int) -> int | None:
        """A slot to prepare `num_rows` rows in for whoever comes next; None if one is prepared already."""
        for slot, (low, high) in self._warm.items():
            if low == 0 and high >= num_rows:
                return slot if self._kv.num_warm_rows(slot, 0, num_rows) < num_rows else None
        if not self._empty:
            return None
        slot = self._empty.pop()
        self._warm[slot] = (0, num_rows)
        return slot

    def _overlap(self, slot: int, begin: int, end: int) -> int:
        low, high = self._warm[slot]
        return max(0, min(high, end) - max(low, begin))

    def _covering(self, begin: int, end: int) -> int | None:
        fitting = [s for s, (low, high) in self._warm.items() if low <= begin and high >= end]
        for slot in sorted(fitting, key=lambda s: self._warm[s][1] - self._warm[s][0]):
            count = self._kv.num_warm_rows(slot, begin, end)
            if count >= end - begin:
                return slot
            self._warm[slot] = (begin, begin + count)
        return None
