"""The physical chunks of one device: who has them, and when they may be touched again.

Invariant: free + owned + retiring == total, checked by `check`. Chunks are made on first need and
kept; `trim` gives the free ones back. A chunk can be mapped at several places (prefix sharing): it
is owned while one live reference is left.

A range that drops a chunk may still be read by steps in flight, so the reference first goes to
limbo with the newest step's number. When that step has finished, a shared chunk is unmapped there,
and a chunk that nobody else holds becomes free but stays mapped: *warm*. A new sequence in the same
slot takes warm chunks over without a driver call; anybody else may steal them for one unmap.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from typing import Protocol

from engine.errors import ConservationError, DriverError
from engine.memory.vmm import VirtualMemory

logger = logging.getLogger(__name__)


class Range(Protocol):
    """What the pool needs of a virtual tensor: a place where chunks are mapped."""

    def unmap_row(self, row: int) -> None: ...


Place = tuple[Range, int]


class ChunkPool:
    """All chunks of one device. Not thread-safe: memory state has one writer, the engine loop.

    Args:
        vm: the driver.
        total: the budget in chunks.
    """

    def __init__(self, vm: VirtualMemory, total: int) -> None:
        self.vm = vm
        self.total = total
        self._handles: dict[int, int] = {}
        self._next_id = 0
        self._num_uncreated = total
        self._num_refused = 0
        self._idle: list[int] = []
        self._warm: OrderedDict[int, Place] = OrderedDict()
        self._owner: dict[int, str] = {}
        self._live: Counter[int] = Counter()
        self._limbo: Counter[int] = Counter()
        # Place -> (step, chunk), oldest first: a place holds at most one reference in limbo.
        self._dropped: OrderedDict[Place, tuple[int, int]] = OrderedDict()
        self._by_owner: Counter[str] = Counter()
        self._num_retiring = 0
        self._launched = 0
        self._completed = 0

    @property
    def num_free(self) -> int:
        """Chunks that `take` could give out now."""
        return self._num_uncreated + len(self._idle) + len(self._warm)

    @property
    def num_warm(self) -> int:
        """Free chunks that are still mapped where they were last used."""
        return len(self._warm)

    @property
    def num_retiring(self) -> int:
        """Chunks without an owner that steps in flight may still read."""
        return self._num_retiring

    @property
    def num_created(self) -> int:
        """Chunks with physical memory behind them."""
        return len(self._handles)

    def num_owned(self, owner: str) -> int:
        """Chunks under one owner's label; a shared chunk counts once."""
        return self._by_owner[owner]

    def handle(self, chunk: int) -> int:
        """The driver's handle of a chunk."""
        return self._handles[chunk]

    def take(self, count: int, owner: str) -> list[int] | None:
        """`count` unmapped chunks for `owner`, or None if there are not enough.

        Order: chunks that exist unmapped, new ones, warm ones (least recently used first). If the
        driver refuses to make a chunk, the budget shrinks to what exists until `ask_again`, and the
        shortage is reported like any other.
        """
        if count > self.num_free:
            return None
        while len(self._idle) < count and self._num_uncreated:
            if not self._create():
                break
        while len(self._idle) < count and self._warm:
            chunk, (tensor, row) = next(iter(self._warm.items()))
            tensor.unmap_row(row)
            del self._warm[chunk]
            self._idle.append(chunk)
        if len(self._idle) < count:
            return None
        taken = [self._idle.pop() for _ in range(count)]
        for chunk in taken:
            self._own(chunk, owner)
        return taken

    def put_back(self, chunks: list[int]) -> None:
        """Return chunks from `take` that were never mapped."""
        for chunk in chunks:
            self._disown(chunk)
            self._idle.append(chunk)

    def can_adopt(self, chunk: int) -> bool:
        """Whether the one place that maps an ownerless chunk could own it again.

        True for a retiring chunk too: what that place writes next is ordered behind the steps that
        still read it, on the same stream.
        """
        return chunk in self._warm or (not self._live[chunk] and self._limbo[chunk] == 1)

    def adopt(self, chunk: int, owner: str, place: Place) -> None:
        """Own a chunk again at the place where it is mapped; no driver call."""
        if chunk in self._warm:
            del self._warm[chunk]
        else:
            del self._dropped[place]
            self._limbo[chunk] = 0
            self._num_retiring -= 1
        self._own(chunk, owner)

    def share(self, chunk: int) -> None:
        """One more live reference to an owned chunk, mapped at one more place."""
        if not self._live[chunk]:
            raise ConservationError(f"chunk {chunk} has no owner to share it")
        self._live[chunk] += 1

    def drop(self, chunk: int, place: Place) -> None:
        """Give up one live reference. The place is cleared or kept warm when it is safe."""
        self._live[chunk] -= 1
        self._limbo[chunk] += 1
        if not self._live[chunk]:
            self._by_owner[self._owner[chunk]] -= 1
            self._num_retiring += 1
        self._dropped[place] = (self._launched, chunk)
        self._settle()

    def launched(self, step: int) -> None:
        """A step that may read every chunk owned now is about to run."""
        self._launched = step

    def finished(self, step: int) -> None:
        """That step, and every one before it, has finished on the device."""
        self._completed = max(self._completed, step)
        self._settle()

    def ask_again(self) -> None:
        """Count chunks that the driver once refused as obtainable again: its memory may be back."""
        self.total += self._num_refused
        self._num_uncreated += self._num_refused
        self._num_refused = 0

    def create_all(self) -> None:
        """Make every chunk of the budget now, as a static engine does."""
        while self._num_uncreated and self._create():
            pass

    def trim(self) -> int:
        """Give every free chunk back to the system; how many chunks that were."""
        for chunk, (tensor, row) in self._warm.items():
            tensor.unmap_row(row)
            self._idle.append(chunk)
        self._warm.clear()
        released = len(self._idle)
        for chunk in self._idle:
            self.vm.release(self._handles.pop(chunk))
        self._idle.clear()
        self._num_uncreated += released
        return released

    def check(self) -> None:
        """Raise ConservationError unless every chunk is in exactly one state."""
        owned = {chunk for chunk, count in self._live.items() if count > 0}
        retiring = {chunk for chunk, count in self._limbo.items() if count > 0} - owned
        sets = [owned, retiring, set(self._idle), set(self._warm)]
        seen = set().union(*sets)
        if sum(map(len, sets)) != len(seen) or seen != set(self._handles):
            raise ConservationError(
                f"chunks in two states or in none: {[len(s) for s in sets]} of {len(self._handles)}"
            )
        if len(seen) + self._num_uncreated != self.total:
            raise ConservationError(f"{len(seen)} chunks + {self._num_uncreated} not made != {self.total}")
        if len(retiring) != self._num_retiring or len(owned) != self._by_owner.total():
            raise ConservationError("the counts of owned or retiring chunks are off")

    def _create(self) -> bool:
        try:
            handle = self.vm.create()
        except DriverError as error:
            logger.warning(
                "pool shrinks from %d to %d chunks: %s", self.total, self.total - self._num_uncreated, error
            )
            self._num_refused += self._num_uncreated
            self.total -= self._num_uncreated
            self._num_uncreated = 0
            return False
        self._handles[self._next_id] = handle
        self._idle.append(self._next_id)
        self._next_id += 1
        self._num_uncreated -= 1
        return True

    def _own(self, chunk: int, owner: str) -> None:
        self._live[chunk] = 1
        self._owner[chunk] = owner
        self._by_owner[owner] += 1

    def _disown(self, chunk: int) -> None:
        self._by_owner[self._owner.pop(chunk)] -= 1
        del self._live[chunk]

    def _settle(self) -> None:
        """Take every dropped reference out of limbo that no step in flight can read any more."""
        while self._dropped:
            (tensor, row), (step, chunk) = next(iter(self._dropped.items()))
            if step > self._completed:
                return
            del self._dropped[tensor, row]
            self._limbo[chunk] -= 1
            if self._live[chunk] or self._limbo[chunk]:
                tensor.unmap_row(row)
                continue
            del self._live[chunk], self._limbo[chunk], self._owner[chunk]
            self._num_retiring -= 1
            self._warm[chunk] = (tensor, row)
