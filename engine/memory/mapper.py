"""Batches of operations on chunks, and the mapper that makes their driver calls from Python.

A mapper takes an operation as far as the driver lets it, and leaves in the batch which call failed, if any,
with the driver's code. `PythonMapper` works in the calling thread; `native.NativeMapper` makes the same
calls in C, and has the thread behind `submit`. Nothing above has to ask which of the two it was.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Protocol

HEADER, WORDS = 3, 5  # of a batch: next, count, done; of an operation: what, handle, source, target, failure
_DONE = 2
_HANDLE, _SOURCE, _TARGET, _FAILURE = range(1, WORDS)
MAKE, RELEASE = 1, 2  # bits of `what`


class Call(IntEnum):
    """The driver call that ended an operation early."""

    CREATE = 1
    MAP = 2
    ACCESS = 3  # refused after a map, which has been undone
    UNMAP = 4
    RELEASE = 5
    UNDO = 6  # the same, but the driver also refused to undo the map: the place is taken
    MARGIN = 7  # not called: there is no room for a chunk outside the margin


Failure = tuple[Call, int]  # and the driver's code


class Batch:
    """Operations for a mapper: (what, handle, source, target) each, 0 for an address that is nowhere.

    Attributes:
        words: the header, then five words an operation; the fifth is 0 or `call << 32 | code`.
        address: of the words. C works on them where they lie: they stay alive until the batch is done.
    """

    def __init__(self, operations: Iterable[tuple[int, int, int, int]]) -> None:
        flat = [word for operation in operations for word in (*operation, 0)]
        self.words = array("Q", [0, len(flat) // WORDS, 0, *flat])
        self.address = self.words.buffer_info()[0]

    def __len__(self) -> int:
        return self.words[1]

    @property
    def is_done(self) -> bool:
        """A plain read of a word that the mapper sets last."""
        return self.words[_DONE] != 0

    @property
    def handles(self) -> Sequence[int]:
        """The handle of every operation, that of a new chunk if it was made."""
        return self.words[HEADER + _HANDLE :: WORDS]

    @property
    def places(self) -> Iterable[tuple[int, int]]:
        """Source and target of every operation."""
        return zip(self.words[HEADER + _SOURCE :: WORDS], self.words[HEADER + _TARGET :: WORDS], strict=True)

    def failures(self) -> dict[int, Failure]:
        """The operations that ended early, by their index."""
        words = self.words[HEADER + _FAILURE :: WORDS]
        return {index: (Call(word >> 32), word & 0xFFFFFFFF) for index, word in enumerate(words) if word}


class Calls(Protocol):
    """Driver calls on one chunk; each answers with the driver's code, 0 for success."""

    def create(self) -> tuple[int, int]:
        """Code and handle."""

    def map(self, address: int, handle: int) -> int: ...

    def access(self, address: int) -> int:
        """Make a mapped chunk accessible, where that takes a call of its own."""

    def unmap(self, address: int) -> int: ...

    def release(self, handle: int) -> int: ...

    def room(self) -> int:
        """Chunks that may be made now."""


class Mapper(Protocol):
    """Makes the calls of batches."""

    @property
    def num_calls(self) -> int: ...

    @property
    def num_calls_beside(self) -> int: ...

    def run(self, batch: Batch, stop: bool) -> int:
        """Make a batch's calls now, in order, up to the first that fails if `stop`; operations before it."""

    def submit(self, batch: Batch) -> None:
        """Have a batch's calls made by the thread, if there is one; all of them, whichever fail."""

    def wait(self, batch: Batch) -> None:
        """Return when a submitted batch is done."""

    def close(self) -> None:
        """Finish what was submitted, and end the thread."""


class PythonMapper:
    """Makes the calls from Python, in the calling thread: what `submit` is given is done when it returns."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.num_calls = 0
        self.num_calls_beside = 0

    def run(self, batch: Batch, stop: bool) -> int:
        words = batch.words
        room: int | None = None
        done = 0
        for at in range(HEADER, len(words), WORDS):
            if words[at] & MAKE and room is None:
                room = self.calls.room()
            words[at + _FAILURE] = failure = self._operate(words, at, room or 0)
            if failure and stop:
                break
            if words[at] & MAKE and room:
                room -= 1
            done += 1
        words[_DONE] = 1
        return done

    def submit(self, batch: Batch) -> None:
        self.run(batch, stop=False)

    def wait(self, batch: Batch) -> None:
        pass

    def close(self) -> None:
        pass

    def _operate(self, words: array[int], at: int, room: int) -> int:
        what, handle, source, target, _ = words[at : at + WORDS]
        if what & MAKE:
            if room <= 0:
                return Call.MARGIN << 32
            self.num_calls += 1
            code, handle = self.calls.create()
            if code:
                return Call.CREATE << 32 | code
            words[at + _HANDLE] = handle
        if source:
            self.num_calls += 1
            if code := self.calls.unmap(source):
                return Call.UNMAP << 32 | code
        if target and (failure := self._map(target, handle)):
            return failure
        if what & RELEASE:
            self.num_calls += 1
            if code := self.calls.release(handle):
                return Call.RELEASE << 32 | code
        return 0

    def _map(self, address: int, handle: int) -> int:
        self.num_calls += 1
        if code := self.calls.map(address, handle):
            return Call.MAP << 32 | code
        if code := self.calls.access(address):
            if undo := self.calls.unmap(address):
                return Call.UNDO << 32 | undo
            return Call.ACCESS << 32 | code
        return 0
