"""Drivers that refuse calls, or put off what they were given: really made calls, in either mapper.

    vm = FailingVirtualMemory(CHUNK_BYTES, 64)
    vm.refuse("map", after=3, times=1)   # the fourth map from now, made at once or beside the steps

What is refused is a driver call on one chunk, one layer below the verbs of `VirtualMemory`: batches, undoing
and outcomes are the driver's own. `Refusals` does the same for any driver, on a GPU too.
"""

from __future__ import annotations

import ctypes
import errno
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from engine.memory.driver import ChunkDriver
from engine.memory.host_vmm import HostVirtualMemory
from engine.memory.native import CallTable
from engine.memory.vmm import Move, Moved

CALLS = ("create", "map", "access", "unmap", "release")


class Refusals:
    """Stands between a driver's mapper and its calls, and answers some of them with an error code.

    Attributes:
        num_seen: calls of each name so far, refused ones too.
        num_refused: those that were refused.

    Args:
        driver: not used elsewhere yet.
        code: what a refused call answers: an errno, or a CUresult.
    """

    def __init__(self, driver: ChunkDriver, code: int = errno.ENOMEM) -> None:
        self.num_seen: Counter[str] = Counter()
        self.num_refused: Counter[str] = Counter()
        self._code = code
        self._spans: dict[str, tuple[int, int]] = {}
        calls: Any = driver._mapper.calls  # type: ignore[attr-defined] # both mappers have it
        for name in CALLS:
            real = getattr(calls, name)
            if isinstance(calls, CallTable):
                kind: Any = type(real)
                own = kind(ctypes.cast(real, ctypes.c_void_p).value)  # a field follows what is put into it
                setattr(calls, name, kind(self._instead(name, own, code)))
            else:
                setattr(calls, name, self._instead(name, real, (code, 0) if name == "create" else code))

    def refuse(self, call: str, after: int = 0, times: int | None = 1) -> None:
        """Refuse a call `times` times (None: from then on), after so many more of its name went through."""
        assert call in CALLS
        first = self.num_seen[call] + after
        self._spans[call] = (first, sys.maxsize if times is None else first + times)

    def allow(self) -> None:
        """Refuse nothing any more."""
        self._spans.clear()

    def _instead(self, name: str, real: Callable[..., Any], refusal: Any) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            index = self.num_seen[name]
            self.num_seen[name] += 1
            first, end = self._spans.get(name, (0, 0))
            if first <= index < end:
                self.num_refused[name] += 1
                return refusal
            return real(*arguments)

        return call


class FailingVirtualMemory(HostVirtualMemory):
    """Host memory that refuses calls when told, and holds back submitted moves when told.

    Args:
        use_native: as for `HostVirtualMemory`.
    """

    def __init__(self, chunk_bytes: int, max_chunks: int, use_native: bool = True) -> None:
        super().__init__(chunk_bytes, max_chunks, use_native)
        self.refusals = Refusals(self)
        self._holds = False
        self._num_tickets = 0
        self._held: dict[int, Sequence[Move]] = {}
        self._given: dict[int, int] = {}

    def refuse(self, call: str, after: int = 0, times: int | None = 1) -> None:
        """See `Refusals.refuse`; `call` is create, map, access, unmap or release."""
        self.refusals.refuse(call, after, times)

    def allow(self) -> None:
        """Refuse nothing any more."""
        self.refusals.allow()

    def hold(self) -> None:
        """Keep what is submitted from now on, undone, until `proceed`: a thread that is slow, at will."""
        self._holds = True

    def proceed(self) -> None:
        """Hand over what was held, in its order, and everything from now on."""
        self._holds = False
        for ticket in list(self._held):
            self._give(ticket)

    def submit(self, moves: Sequence[Move]) -> int:
        self._num_tickets += 1
        self._held[self._num_tickets] = list(moves)
        if not self._holds:
            self._give(self._num_tickets)
        return self._num_tickets

    def is_done(self, ticket: int) -> bool:
        return ticket in self._given and super().is_done(self._given[ticket])

    def collect(self, ticket: int) -> list[Moved]:
        """Waiting for a ticket is waiting for those before it."""
        for earlier in [held for held in self._held if held <= ticket]:
            self._give(earlier)
        return super().collect(self._given.pop(ticket))

    def close(self) -> None:
        self.allow()
        self.proceed()
        for ticket in list(self._given):
            self.collect(ticket)
        super().close()

    def _give(self, ticket: int) -> None:
        self._given[ticket] = super().submit(self._held.pop(ticket))
