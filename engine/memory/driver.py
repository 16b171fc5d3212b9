"""What both drivers share: the verbs of `VirtualMemory`, as batches for a mapper, and their ends as values.

The books here say what is mapped and made, so that `close` can return it; who may use what is known above.
"""

from __future__ import annotations

import logging
import os
import sys
import weakref
from collections.abc import Callable, Sequence

from engine.errors import DriverError
from engine.memory.mapper import MAKE, RELEASE, Batch, Call, Failure, Mapper
from engine.memory.vmm import Move, Moved, Outcome

logger = logging.getLogger(__name__)

_OUTCOMES = {
    Call.CREATE: Outcome.NOT_MADE,
    Call.MARGIN: Outcome.NOT_MADE,
    Call.UNMAP: Outcome.STAYED,
    Call.MAP: Outcome.UNMAPPED,
    Call.ACCESS: Outcome.UNMAPPED,
    Call.UNDO: Outcome.UNMAPPED,
}


class ChunkDriver:
    """The verbs of `VirtualMemory` on chunks, over a mapper. The thread ends with the driver, or at exit.

    Memory goes back when nobody refers to the driver or to a view of it any more, without a `close`: whoever
    drops an engine expects that.

    Args:
        chunk_bytes: size of a chunk.
        mapper: makes the calls.
        explain: the error that stands for a failed call.
    """

    def __init__(self, chunk_bytes: int, mapper: Mapper, explain: Callable[[Failure], DriverError]) -> None:
        self.chunk_bytes = chunk_bytes
        self._mapper = mapper
        self._explain = explain
        self._handles: set[int] = set()
        self._places: set[int] = set()  # mapped addresses
        self._stuck: set[int] = set()  # those whose map had to be undone, and the driver refused to
        self._tickets: dict[int, Batch] = {}  # alive until they are done: `_end` runs before this goes
        self._last_ticket = 0
        self._process = os.getpid()
        self._end = weakref.finalize(self, mapper.close)  # last: `__del__` looks for it

    @property
    def num_calls(self) -> int:
        """Calls made at once; without the native helper, those of `submit` too."""
        return self._mapper.num_calls

    @property
    def num_calls_beside(self) -> int:
        """Calls made by the thread behind `submit`."""
        return self._mapper.num_calls_beside

    def enter(self) -> None:
        """Nothing to do where memory belongs to the process."""

    def create(self, count: int) -> list[int]:
        batch = Batch([(MAKE, 0, 0, 0)] * count)
        num_made = self._run(batch, "create")
        made = list(batch.handles[:num_made])
        self._handles.update(made)
        return made

    def map(self, addresses: Sequence[int], handles: Sequence[int]) -> None:
        self._clear_stuck()
        batch = Batch((0, handle, 0, address) for address, handle in zip(addresses, handles, strict=True))
        done = self._mapper.run(batch, stop=True)
        for failure in batch.failures().values():
            if failure[0] is Call.UNDO:
                self._stuck.add(addresses[done])
            self._stuck.update(addresses[self.unmap(addresses[:done]) : done])
            raise self._explain(failure)
        self._places.update(addresses)

    def unmap(self, addresses: Sequence[int]) -> int:
        done = self._run(Batch((0, 0, address, 0) for address in addresses), "unmap")
        for places in (self._places, self._stuck):
            places.difference_update(addresses[:done])
        return done

    def release(self, handles: Sequence[int]) -> int:
        done = self._run(Batch((RELEASE, handle, 0, 0) for handle in handles), "release")
        self._handles.difference_update(handles[:done])
        return done

    def submit(self, moves: Sequence[Move]) -> int:
        self._clear_stuck()
        batch = Batch(
            (handle is None, handle or 0, source or 0, target or 0) for handle, source, target in moves
        )
        self._last_ticket += 1
        self._tickets[self._last_ticket] = batch
        self._mapper.submit(batch)
        return self._last_ticket

    def is_done(self, ticket: int) -> bool:
        return self._tickets[ticket].is_done

    def collect(self, ticket: int) -> list[Moved]:
        batch = self._tickets[ticket]
        self._mapper.wait(batch)
        del self._tickets[ticket]
        failures = batch.failures()
        self._log(failures, f"of {len(batch)} moves were refused")
        return [
            self._moved(handle, source, target, failures.get(index))
            for index, (handle, (source, target)) in enumerate(zip(batch.handles, batch.places, strict=True))
        ]

    def close(self) -> None:
        """What the driver refuses to take back is logged, and stays."""
        for ticket in list(self._tickets):
            self.collect(ticket)
        unmaps = [(0, 0, address, 0) for address in self._places | self._stuck]
        batch = Batch(unmaps + [(RELEASE, handle, 0, 0) for handle in self._handles])
        self._mapper.run(batch, stop=False)
        self._log(batch.failures(), f"of {len(batch)} chunks and places were not returned")
        for known in (self._places, self._stuck, self._handles):
            known.clear()
        self._end()

    def __del__(self) -> None:
        # Not for one half made. At exit the system takes everything back; a forked child owns nothing of it.
        if "_end" in vars(self) and not sys.is_finalizing() and os.getpid() == self._process:
            self.close()

    def _run(self, batch: Batch, verb: str) -> int:
        done = self._mapper.run(batch, stop=True)
        self._log(batch.failures(), f"call refused, {verb} ended after {done} of {len(batch)} chunks")
        return done

    def _log(self, failures: dict[int, Failure], what: str) -> None:
        for failure in list(failures.values())[:1]:
            # That the margin is reached is no fault, and the pool tells of it.
            level = logging.DEBUG if failure[0] is Call.MARGIN else logging.WARNING
            logger.log(level, "%d %s: %s", len(failures), what, self._explain(failure))

    def _moved(self, handle: int, source: int, target: int, failure: Failure | None) -> Moved:
        """How one move ended; the books are brought up to date."""
        outcome = _OUTCOMES[failure[0]] if failure else Outcome.DONE
        if outcome is Outcome.NOT_MADE:
            return Moved(None, outcome)
        self._handles.add(handle)
        if outcome is not Outcome.STAYED:
            self._places.discard(source)
        if outcome is Outcome.DONE and target:
            self._places.add(target)
        if failure and failure[0] is Call.UNDO:
            self._stuck.add(target)
        return Moved(handle, outcome)

    def _clear_stuck(self) -> None:
        """Nobody else knows of the places where a map could not be undone, and they may be mapped to now."""
        for address in list(self._stuck):
            self.unmap([address])
