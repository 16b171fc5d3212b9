"""Copies between chunks and host chunks, beside the steps: what the pool asks for, and its CPU version.

Copies are whole chunks: on an H100 pieces of 2 MiB run at 45 to 51 GiB/s each way, pieces of 32 KiB at 5. On
a GPU `cuda_copies.CudaCopies` makes them.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from queue import SimpleQueue
from typing import NamedTuple, Protocol

from engine.errors import DriverError


class Direction(Enum):
    """Which way a copy goes. The two ways are independent of one another."""

    OUT = "to the host"
    IN = "to the device"


class Piece(NamedTuple):
    """One contiguous copy."""

    target: int
    source: int
    nbytes: int


class Ticket(Protocol):
    """Copies that were submitted together."""

    @property
    def is_done(self) -> bool:
        """Whether they have ended, failed ones too. Never waits."""

    def wait(self) -> None:
        """Return when they have ended.

        Raises:
            DriverError: one of them failed, and what the targets hold is undefined.
        """


class Copies(Protocol):
    """A queue of copies in each direction. Used by one thread.

    Attributes:
        chunk_bytes: size of a chunk.
    """

    chunk_bytes: int

    def bytes_moved(self, direction: Direction) -> int:
        """Bytes submitted so far."""

    def submit(
        self, direction: Direction, targets: Sequence[int], sources: Sequence[int], after_steps: bool
    ) -> Ticket:
        """Copy whole chunks, the one at `sources[i]` to `targets[i]` (addresses), in order in a direction.

        Until the ticket is done, neither may be unmapped or written to, nor the targets read.

        Args:
            after_steps: begin when every step that has been launched has finished on the device.
        """

    def hold_steps(self, ticket: Ticket) -> None:
        """What is launched from now on begins when that copy has ended, or failed. The host need not wait."""

    def keep(self, *owners: object) -> None:
        """These own the memory that is copied, and stay while anything that was submitted is under way."""

    def close(self) -> None:
        """Finish what was submitted, and end. Whoever is collected with copies under way need not."""


def merge(targets: Sequence[int], sources: Sequence[int], chunk_bytes: int) -> Iterator[Piece]:
    """Copies of chunks as few pieces: neighbours at both ends are one. The order is kept."""
    target = source = nbytes = 0
    for next_target, next_source in zip(targets, sources, strict=True):
        if nbytes and (next_target, next_source) == (target + nbytes, source + nbytes):
            nbytes += chunk_bytes
            continue
        if nbytes:
            yield Piece(target, source, nbytes)
        target, source, nbytes = next_target, next_source, chunk_bytes
    if nbytes:
        yield Piece(target, source, nbytes)


class ThreadCopies:
    """Implements `Copies` on a CPU: a thread for each direction. Steps there have finished when they return.

    Args:
        chunk_bytes: size of a chunk.
        move: copies so many bytes (target, source, bytes) without the interpreter's lock.
    """

    def __init__(self, chunk_bytes: int, move: Callable[[int, int, int], object] = ctypes.memmove) -> None:
        self.chunk_bytes = chunk_bytes
        self._bytes = dict.fromkeys(Direction, 0)
        self._owners: tuple[object, ...] = ()
        self._queues: dict[Direction, SimpleQueue[_ThreadTicket | None]] = {}
        self._threads: list[threading.Thread] = []
        for direction in Direction:
            queue = self._queues[direction] = SimpleQueue()
            name = f"ballonet-copies-{direction.name.lower()}"
            self._threads.append(threading.Thread(target=_work, args=(queue, move), name=name, daemon=True))
            self._threads[-1].start()
        self._end = weakref.finalize(self, _end, list(self._queues.values()))

    def bytes_moved(self, direction: Direction) -> int:
        return self._bytes[direction]

    def submit(
        self, direction: Direction, targets: Sequence[int], sources: Sequence[int], after_steps: bool
    ) -> Ticket:
        ticket = _ThreadTicket(list(merge(targets, sources, self.chunk_bytes)), self._owners)
        self._bytes[direction] += len(targets) * self.chunk_bytes
        self._queues[direction].put(ticket)
        return ticket

    def hold_steps(self, ticket: Ticket) -> None:
        with contextlib.suppress(DriverError):
            ticket.wait()

    def keep(self, *owners: object) -> None:
        self._owners = owners

    def close(self) -> None:
        self._end()
        for thread in self._threads:
            thread.join()


class _ThreadTicket:
    def __init__(self, pieces: Sequence[Piece], owners: tuple[object, ...]) -> None:
        self._pieces = pieces
        self._owners = owners
        self._has_ended = threading.Event()
        self._reason: str | None = None

    @property
    def is_done(self) -> bool:
        return self._has_ended.is_set()

    def wait(self) -> None:
        self._has_ended.wait()
        if self._reason is not None:
            raise DriverError("memmove", self._reason)

    def run(self, move: Callable[[int, int, int], object]) -> None:
        """The thread's part."""
        try:
            for piece in self._pieces:
                move(*piece)
        except Exception as error:  # a thread that ended here would leave every later ticket waiting
            self._reason = str(error) or type(error).__name__
        self._owners = ()
        self._has_ended.set()


def _work(queue: SimpleQueue[_ThreadTicket | None], move: Callable[[int, int, int], object]) -> None:
    while (ticket := queue.get()) is not None:
        ticket.run(move)


def _end(queues: Sequence[SimpleQueue[_ThreadTicket | None]]) -> None:
    for queue in queues:
        queue.put(None)
