"""Memory, host memory and copies that do not exist, in a time that does not pass by itself.

The real scheduler and the real pool run over these against a model of step times, thousands of times faster
than a GPU would serve the same load. Nothing here is used to serve.
"""

from __future__ import annotations

import errno
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

import torch

from engine.errors import DriverError
from engine.memory.copies import Direction, Ticket
from engine.memory.driver import ChunkDriver
from engine.memory.mapper import Call, Failure, PythonMapper
from engine.memory.slabs import Slab
from engine.memory.vmm import Move, Moved, Outcome

T = TypeVar("T")

_BASE, _SLAB_BASE = 1 << 44, 1 << 45  # addresses that nobody has, and that read well


class VirtualClock:
    """Seconds that pass when they are told to. A call tells the time."""

    def __init__(self, now: float = 0.0) -> None:
        self._now = now

    def __call__(self) -> float:
        return self._now

    def advance_to(self, seconds: float) -> None:
        """Let it be that time, unless it is later already."""
        self._now = max(self._now, seconds)

    def advance(self, seconds: float) -> None:
        """Let that many seconds pass; some, where rounding loses them, or a sleeper wakes early for ever."""
        least = math.nextafter(self._now, math.inf) if seconds > 0 else self._now
        self.advance_to(max(self._now + seconds, least))


class SimulatedCopies:
    """Implements `Copies` as a link that serves each direction at a bandwidth of its own. It moves nothing.

    Args:
        chunk_bytes: size of a chunk.
        clock: seconds. One with `advance_to` is advanced by a wait; for another, a wait sleeps.
        bytes_per_s: bandwidth of a direction.
        steps_end: when the steps launched so far end, on the same clock; None: they have ended.
        hold: told until when no step that is launched later may go on.
    """

    def __init__(
        self,
        chunk_bytes: int,
        clock: Callable[[], float],
        bytes_per_s: float,
        steps_end: Callable[[], float] | None = None,
        hold: Callable[[float], None] = lambda until: None,
    ) -> None:
        self._hold = hold
        self.chunk_bytes = chunk_bytes
        self._clock = clock
        self._bytes_per_s = bytes_per_s
        self._steps_end = steps_end or clock
        self._bytes = dict.fromkeys(Direction, 0)
        self._idle_at = dict.fromkeys(Direction, 0.0)

    def bytes_moved(self, direction: Direction) -> int:
        return self._bytes[direction]

    def submit(
        self, direction: Direction, targets: Sequence[int], sources: Sequence[int], after_steps: bool
    ) -> Ticket:
        nbytes = sum(self.chunk_bytes for _ in zip(targets, sources, strict=True))
        begin = max(self._idle_at[direction], self._clock())
        if after_steps:
            begin = max(begin, self._steps_end())
        self._idle_at[direction] = begin + nbytes / self._bytes_per_s
        self._bytes[direction] += nbytes
        return _SimulatedTicket(self._idle_at[direction], self._clock)

    def hold_steps(self, ticket: Ticket) -> None:
        if isinstance(ticket, _SimulatedTicket):
            self._hold(ticket.end)

    def keep(self, *owners: object) -> None:
        """Nothing is copied."""

    def close(self) -> None:
        """There is nothing to end."""


class _SimulatedTicket:
    def __init__(self, end: float, clock: Callable[[], float]) -> None:
        self.end = end
        self._clock = clock

    @property
    def is_done(self) -> bool:
        return self._clock() >= self.end

    def wait(self) -> None:
        advance_to = getattr(self._clock, "advance_to", None)
        if advance_to is not None:
            advance_to(self.end)
        while not self.is_done:
            time.sleep(self.end - self._clock())


class SimulatedWorker(Executor):
    """A background thread that does everything at once, and is done with one thing after the other later.

    Args:
        clock: seconds.
        task_s: that each thing takes, such as pinning a slab.
    """

    def __init__(self, clock: Callable[[], float], task_s: float) -> None:
        self._clock = clock
        self._task_s = task_s
        self._idle_at = 0.0

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        self._idle_at = max(self._idle_at, self._clock()) + self._task_s
        future: _Due[T] = _Due(self._clock, self._idle_at)
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # whoever asks for the result has it
            future.set_exception(error)
        return future


class _Due(Future[T]):
    def __init__(self, clock: Callable[[], float], at: float) -> None:
        super().__init__()
        self._clock = clock
        self._at = at

    def done(self) -> bool:
        return self._clock() >= self._at


class NullVirtualMemory(ChunkDriver):
    """Implements `VirtualMemory` with books only, as strict as `HostVirtualMemory`. A handle is a number.

    Args:
        chunk_bytes: size of a chunk.
        max_chunks: chunks there can be at once; one more is refused.
    """

    def __init__(self, chunk_bytes: int, max_chunks: int = sys.maxsize) -> None:
        self._calls = _NullCalls(chunk_bytes, max_chunks)
        super().__init__(chunk_bytes, PythonMapper(self._calls), _explain)

    def reserve(self, num_chunks: int) -> int:
        return self._calls.reserve(num_chunks)

    def view(self, address: int, num_chunks: int) -> torch.Tensor:
        """A tensor of the right size and type, without content."""
        return torch.empty(num_chunks * self.chunk_bytes, dtype=torch.uint8, device="meta")


class _NullCalls:
    """Implements `mapper.Calls`. Ranges lie one after another, with a gap of a chunk between two."""

    def __init__(self, chunk_bytes: int, max_chunks: int) -> None:
        self._chunk_bytes = chunk_bytes
        self._max_chunks = max_chunks
        self._end = -(-_BASE // chunk_bytes) * chunk_bytes
        self._gaps: set[int] = set()
        self._first = self._end
        self._num_places: dict[int, int] = {}  # of each chunk
        self._handle_at: dict[int, int] = {}
        self._last_handle = 0

    def reserve(self, num_chunks: int) -> int:
        """The address of a new range."""
        address = self._end
        self._gaps.add(address + num_chunks * self._chunk_bytes)
        self._end = address + (num_chunks + 1) * self._chunk_bytes
        return address

    def create(self) -> tuple[int, int]:
        if len(self._num_places) >= self._max_chunks:
            return errno.ENOMEM, 0
        self._last_handle += 1
        self._num_places[self._last_handle] = 0
        return 0, self._last_handle

    def map(self, address: int, handle: int) -> int:
        is_place = self._first <= address < self._end and address % self._chunk_bytes == 0
        if handle not in self._num_places or not is_place or address in self._gaps:
            return errno.EINVAL
        if address in self._handle_at:
            return errno.EEXIST
        self._handle_at[address] = handle
        self._num_places[handle] += 1
        return 0

    def access(self, address: int) -> int:
        return 0

    def unmap(self, address: int) -> int:
        if address not in self._handle_at:
            return errno.EINVAL
        self._num_places[self._handle_at.pop(address)] -= 1
        return 0

    def release(self, handle: int) -> int:
        if handle not in self._num_places:
            return errno.EINVAL
        if self._num_places[handle]:
            return errno.EBUSY
        del self._num_places[handle]
        return 0

    def room(self) -> int:
        return sys.maxsize


class UncheckedVirtualMemory:
    """Implements `VirtualMemory` without books or refusals, for hundreds of engines: a handle is a number."""

    def __init__(self, chunk_bytes: int) -> None:
        self.chunk_bytes = chunk_bytes
        self.num_calls = self.num_calls_beside = 0
        self._end = -(-_BASE // chunk_bytes) * chunk_bytes
        self._last_handle = 0
        self._moved: dict[int, list[Moved]] = {}

    def enter(self) -> None:
        """There is no device."""

    def reserve(self, num_chunks: int) -> int:
        address = self._end
        self._end += (num_chunks + 1) * self.chunk_bytes
        return address

    def create(self, count: int) -> list[int]:
        self.num_calls += count
        self._last_handle += count
        return list(range(self._last_handle - count + 1, self._last_handle + 1))

    def map(self, addresses: Sequence[int], handles: Sequence[int]) -> None:
        self.num_calls += len(handles)

    def unmap(self, addresses: Sequence[int]) -> int:
        self.num_calls += len(addresses)
        return len(addresses)

    def release(self, handles: Sequence[int]) -> int:
        self.num_calls += len(handles)
        return len(handles)

    def submit(self, moves: Sequence[Move]) -> int:
        """They are made here and now."""
        ticket = self._last_handle = self._last_handle + 1
        self._moved[ticket] = [
            Moved(self.create(1)[0] if handle is None else handle, Outcome.DONE) for handle, _, _ in moves
        ]
        return ticket

    def is_done(self, ticket: int) -> bool:
        return True

    def collect(self, ticket: int) -> list[Moved]:
        return self._moved.pop(ticket)

    def view(self, address: int, num_chunks: int) -> torch.Tensor:
        """A tensor of the right size and type, without content."""
        return torch.empty(num_chunks * self.chunk_bytes, dtype=torch.uint8, device="meta")

    def close(self) -> None:
        """There is nothing to end."""


def _explain(failure: Failure) -> DriverError:
    call, code = failure
    return DriverError(f"simulated {Call(call).name.lower()}", os.strerror(code))


class NullSlabs:
    """Implements `SlabMaker` without memory."""

    def __init__(self) -> None:
        self._end = _SLAB_BASE

    def make(self, nbytes: int) -> Slab:
        """A slab at an address that nobody may touch."""
        slab = _NullSlab(self._end)
        self._end += nbytes
        return slab


class _NullSlab:
    def __init__(self, address: int) -> None:
        self.address = address

    def free(self) -> None:
        """There is nothing to give back."""
