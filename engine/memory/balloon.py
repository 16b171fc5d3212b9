"""The balloon: the CPU-side buffer of one rank, host memory in chunk geometry.

It owns which host chunks exist and which are taken, and grows in the background, a slab at a time: pinning
costs 0.67 s a GiB. What is in a chunk, and whether a copy into it is under way, is known above.

All books are changed by the thread that calls; the one behind it only makes slabs.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from engine.errors import ConservationError, DriverError
from engine.memory.host_memory import room_bytes

if TYPE_CHECKING:
    from engine.memory.slabs import Slab, SlabMaker  # which loads torch

logger = logging.getLogger(__name__)

_MANY = (
    256  # chunks that are worth sorting for: neighbours are copied as one, and a stream holds 1,024 copies
)
_RETRY_S = 30.0  # after a refusal: asking costs the host a search for memory


class Balloon:
    """Host chunks, numbered from 0, which exist until `close`.

    Attributes:
        chunk_bytes: size of a chunk.
        max_chunks: chunks there may be; after a refusal, those that there are, until a slab is made again.
        num_logical: chunks that may be taken at once, by the order last given; `max_chunks` at first.

    Args:
        maker: where slabs come from; called by the background thread.
        chunk_bytes: size of a chunk, that of the device's.
        max_chunks: chunks there may be.
        slab_chunks: chunks of a slab. A large one pins for seconds, and the first chunks come with the last.
        host_room: bytes that the host can spare; no larger slab is made. Called by the background thread.
        clock: seconds, monotonic.
        is_filled: make all of them from the start, in the background, rather than as they are needed.
    """

    def __init__(
        self,
        maker: SlabMaker,
        chunk_bytes: int,
        max_chunks: int,
        slab_chunks: int,
        host_room: Callable[[], int] = room_bytes,
        clock: Callable[[], float] = time.monotonic,
        is_filled: bool = False,
    ) -> None:
        self.chunk_bytes = chunk_bytes
        self.max_chunks = max_chunks
        self.num_logical = max_chunks
        self._largest = max_chunks
        self._slab_chunks = slab_chunks
        self._maker = maker
        self._host_room = host_room
        self._clock = clock
        self._is_filled = is_filled
        self._slabs: list[Slab] = []
        self._free: list[int] = []  # taken from the end
        self._used: set[int] = set()
        self._num_asked = 0  # free chunks that somebody has asked for in vain
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="ballonet-balloon")
        self._growth: Future[Slab] | None = None
        self._retry_at = -math.inf
        self._has_warned = False

    @property
    def num_physical(self) -> int:
        """Chunks that exist."""
        return min(len(self._slabs) * self._slab_chunks, self._largest)

    @property
    def num_used(self) -> int:
        """Chunks that are taken."""
        return len(self._used)

    @property
    def num_free(self) -> int:
        """Chunks that could be taken, now or after growth."""
        return max(0, min(self.num_logical, self.max_chunks) - self.num_used)

    @property
    def num_spare(self) -> int:
        """Chunks that could be taken now."""
        return max(0, min(len(self._free), self.num_logical - self.num_used))

    @property
    def is_growing(self) -> bool:
        """Whether a slab is being made."""
        return self._growth is not None

    def take(self, count: int) -> list[int] | None:
        """`count` chunks, or None if fewer are there now.

        Chunks that could be there are then made in the background, so that a later call succeeds. It never
        waits for them. The chunks of one call are neighbours as far as there are any.
        """
        if count > max(0, self.num_logical - self.num_used):
            return None
        if count > len(self._free):
            self._num_asked = max(self._num_asked, count)
            self.grow_ahead()
            if count > len(self._free):
                return None
        self._num_asked = 0
        if count >= _MANY:
            self._free.sort(reverse=True)
        split = len(self._free) - count
        taken = self._free[split:][::-1]
        del self._free[split:]
        self._used.update(taken)
        return taken

    def put_back(self, chunks: Iterable[int]) -> None:
        """Return chunks. No copy from or into them may be under way.

        Raises:
            ConservationError: one of them is not taken; nothing is returned.
        """
        returned = list(chunks)
        if not self._used.issuperset(returned) or len(set(returned)) < len(returned):
            raise ConservationError(f"host chunks {returned} are not all taken")
        self._used.difference_update(returned)
        self._free += reversed(returned)

    def set_logical(self, count: int) -> None:
        """Inflate or deflate to `count` chunks, within what there may ever be.

        Deflating below what is taken takes nothing away: it only stops `take`.
        """
        self.num_logical = min(max(count, 0), self._largest)

    def address_of(self, chunk: int) -> int:
        """Where a chunk begins."""
        slab, row = divmod(chunk, self._slab_chunks)
        return self._slabs[slab].address + row * self.chunk_bytes

    def grow_ahead(self) -> None:
        """Take in a finished slab, and have one made if too few chunks are free. Cheap: for every step."""
        self._receive()
        is_short = 2 * len(self._free) < self._slab_chunks or len(self._free) < self._num_asked
        is_short |= self._is_filled
        if is_short and self._growth is None and self.num_physical < self.num_logical:
            self._grow()

    def check(self) -> None:
        """Raise ConservationError unless every chunk is either free or taken, once."""
        known = self._used.union(self._free)
        num_known = len(self._used) + len(self._free)
        if num_known != len(known) or known != set(range(self.num_physical)):
            raise ConservationError(
                f"host chunks free in {len(self._free)} places and taken in {len(self._used)}, "
                f"{len(known)} different ones, of {self.num_physical}"
            )

    def close(self) -> None:
        """Return all memory, after a slab that is being made. Copies must have ended."""
        self._worker.shutdown()
        self._receive()
        for slab in self._slabs:
            slab.free()
        self._largest = self.max_chunks = self.num_logical = 0
        self._slabs.clear()
        self._free.clear()
        self._used.clear()

    def _grow(self) -> None:
        if self._clock() >= self._retry_at:
            num_chunks = min(self._slab_chunks, self._largest - self.num_physical)
            nbytes = num_chunks * self.chunk_bytes
            self._growth = self._worker.submit(_make, self._maker, nbytes, self._host_room)

    def _receive(self) -> None:
        if self._growth is None or not self._growth.done():
            return
        growth, self._growth = self._growth, None
        error = growth.exception()
        if error is not None:  # whatever it was: an engine without a balloon serves, only slower
            self._refused(error)
            return
        first = self.num_physical
        self._slabs.append(growth.result())
        # Older chunks are taken first: their pages have been touched.
        self._free[:0] = range(self.num_physical - 1, first - 1, -1)
        self.max_chunks = self._largest
        self._retry_at = -math.inf

    def _refused(self, error: BaseException) -> None:
        """The host has no more memory: do with what there is, and ask again later."""
        self.max_chunks = self.num_physical
        self._retry_at = self._clock() + _RETRY_S
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "the balloon stays at %.1f of %.1f GiB of host memory, until more can be had: %s. "
                "Remedy: raise `ulimit -l` or the process's memory limit, or lower memory.balloon_bytes",
                self.num_physical * self.chunk_bytes / 2**30,
                self._largest * self.chunk_bytes / 2**30,
                error if isinstance(error, DriverError) else repr(error),
                exc_info=None if isinstance(error, DriverError) else error,
            )


def _make(maker: SlabMaker, nbytes: int, host_room: Callable[[], int]) -> Slab:
    """The background thread's part."""
    if (room := host_room()) < nbytes:
        raise DriverError("a slab", f"{nbytes} bytes are wanted, and the host can spare {max(room, 0)}")
    return maker.make(nbytes)
