"""The balloon: the CPU-side buffer of one rank, host memory in chunk geometry.

It owns which host chunks exist and which are taken. It grows in the background, a slab at a time: pinning
costs 0.67 s a GiB. Told to be smaller, it gives slabs back to the host, the emptiest first, each as soon as
nobody uses a chunk of it: nothing is thrown away. What is in a chunk, and whether a copy into it is under
way, is known above.

All books are changed by the thread that calls; the one behind it only makes slabs.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class _Held:
    """A slab, and the numbers of its chunks."""

    slab: Slab
    chunks: range


class Balloon:
    """Host chunks. The numbers of those in the i-th slab begin at i slabs; one that has gone leaves a gap.

    Attributes:
        chunk_bytes: size of a chunk.
        slab_chunks: chunks of a slab; one may have fewer, if no more may be.
        max_chunks: chunks there may be; after a refusal, those that there are, until a slab is made again.
        num_logical: chunks that may be taken at once, by the order last given; `max_chunks` at first.

    Args:
        maker: where slabs come from; called by the background thread.
        chunk_bytes: size of a chunk, that of the device's.
        max_chunks: chunks there may be, until `set_physical` says otherwise.
        slab_chunks: chunks of a slab. A large one pins for seconds, and the first chunks come with the last.
        host_room: bytes that the host can spare; no larger slab is made. Called by the background thread.
        clock: seconds, monotonic.
        is_filled: make all of them from the start, in the background, rather than as they are needed.
        worker: what makes slabs and gives them back; None is a thread.
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
        worker: Executor | None = None,
    ) -> None:
        self.chunk_bytes = chunk_bytes
        self.max_chunks = max_chunks
        self.num_logical = max_chunks
        self._largest = max_chunks
        self.slab_chunks = slab_chunks
        self._maker = maker
        self._host_room = host_room
        self._clock = clock
        self._is_filled = is_filled
        self._slabs: dict[int, _Held] = {}
        self._leaving: set[int] = set()  # slabs that are to go
        self._taken: dict[int, set[int]] = {}  # chunks of each slab, while some are to go
        self._released: list[tuple[Future[None], int]] = []  # slabs that are going, and their chunks
        self._free: list[int] = []  # taken from the end; none in a slab that is to go
        self._used: set[int] = set()
        self._num_asked = 0  # free chunks that somebody has asked for in vain
        self._worker = worker or ThreadPoolExecutor(1, thread_name_prefix="ballonet-balloon")
        self._growth: Future[Slab] | None = None
        self._num_growing = 0
        self._retry_at = -math.inf
        self._has_warned = False

    @property
    def num_physical(self) -> int:
        """Chunks that exist."""
        return sum([len(held.chunks) for held in self._slabs.values()])

    @property
    def num_held(self) -> int:
        """The same with those that are just going back to the host."""
        return self.num_physical + sum([count for _, count in self._released])

    @property
    def num_limit(self) -> int:
        """Chunks that there may be, by configuration or by the order last given."""
        return self._largest

    @property
    def is_shrinking(self) -> bool:
        """Whether slabs wait for their last chunks to be put back, to go then."""
        return bool(self._leaving)

    def is_leaving(self, chunk: int) -> bool:
        """Whether a chunk's slab is to go back to the host."""
        return chunk // self.slab_chunks in self._leaving

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
        for chunk in taken if self._leaving else ():
            self._taken[chunk // self.slab_chunks].add(chunk)
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
        if not self._leaving:
            self._free += reversed(returned)
            return
        for chunk in reversed(returned):
            self._taken[chunk // self.slab_chunks].discard(chunk)
            if not self.is_leaving(chunk):
                self._free.append(chunk)
        self._release_empty()

    def set_logical(self, count: int) -> None:
        """Inflate or deflate to `count` chunks, within what there may ever be.

        Deflating below what is taken takes nothing away: it only stops `take`.
        """
        self.num_logical = min(max(count, 0), self._largest)

    def set_physical(self, count: int) -> None:
        """Let there be `count` chunks at most; fewer are made as long as fewer are needed.

        Slabs beyond go back to the host, the emptiest first, each once its chunks have been put back. Until
        then nobody is given another chunk of it.
        """
        if count > self._largest:
            self._retry_at = -math.inf  # whoever ordered it made room for it
        self._largest = self.max_chunks = max(count, 0)
        self.num_logical = min(self.num_logical, self._largest)
        self._settle_size()

    def address_of(self, chunk: int) -> int:
        """Where a chunk begins."""
        slab, row = divmod(chunk, self.slab_chunks)
        return self._slabs[slab].slab.address + row * self.chunk_bytes

    def grow_ahead(self) -> None:
        """Take in a finished slab, and have one made if too few chunks are free. Cheap: for every step."""
        self._receive()
        self._released = [(going, count) for going, count in self._released if not going.done()]
        is_short = 2 * len(self._free) < self.slab_chunks or len(self._free) < self._num_asked
        is_short |= self._is_filled
        if is_short and self._growth is None and self.num_physical < min(self.num_logical, self._largest):
            self._grow()

    def check(self) -> None:
        """Raise ConservationError unless every chunk is either free or taken, once."""
        leaving = {
            chunk for at in self._leaving for chunk in self._slabs[at].chunks if chunk not in self._taken[at]
        }
        known = self._used.union(self._free, leaving)
        num_known = len(self._used) + len(self._free) + len(leaving)
        there = {chunk for held in self._slabs.values() for chunk in held.chunks}
        if num_known != len(known) or known != there:
            raise ConservationError(
                f"host chunks free in {len(self._free)} places and taken in {len(self._used)}, "
                f"{len(known)} different ones, of {self.num_physical}"
            )

    def close(self) -> None:
        """Return all memory, after a slab that is being made. Copies must have ended."""
        self._worker.shutdown()
        self._receive()
        for held in self._slabs.values():
            held.slab.free()
        self._largest = self.max_chunks = self.num_logical = 0
        self._slabs.clear()
        self._leaving.clear()
        self._released.clear()
        self._free.clear()
        self._used.clear()

    def _grow(self) -> None:
        if self._clock() >= self._retry_at:
            self._num_growing = min(self.slab_chunks, self._largest - self.num_physical)
            nbytes = self._num_growing * self.chunk_bytes
            self._growth = self._worker.submit(_make, self._maker, nbytes, self._host_room)

    def _receive(self) -> None:
        if self._growth is None or not self._growth.done():
            return
        growth, self._growth = self._growth, None
        error = growth.exception()
        if error is not None:  # whatever it was: an engine without a balloon serves, only slower
            self._refused(error)
            return
        at = next(at for at in range(len(self._slabs) + 1) if at not in self._slabs)
        first = at * self.slab_chunks
        held = _Held(growth.result(), range(first, first + self._num_growing))
        self._slabs[at] = held
        # Older chunks are taken first: their pages have been touched.
        self._free[:0] = reversed(held.chunks)
        self.max_chunks = self._largest
        self._retry_at = -math.inf
        self._settle_size()  # it may have been ordered otherwise meanwhile

    def _settle_size(self) -> None:
        """Choose which slabs are to go, those with the fewest chunks taken, so that no more stay than may."""
        was_leaving, self._leaving = self._leaving, set()
        excess = self.num_physical - self._largest
        if excess <= 0 and not was_leaving:
            return
        self._taken = {at: set() for at in self._slabs}
        for chunk in self._used:
            self._taken[chunk // self.slab_chunks].add(chunk)
        for at in sorted(self._slabs, key=lambda at: (len(self._taken[at]), -at)):
            if excess > 0:
                excess -= len(self._slabs[at].chunks)
                self._leaving.add(at)
        self._free = [chunk for chunk in self._free if not self.is_leaving(chunk)]
        for at in sorted(was_leaving - self._leaving, reverse=True):
            self._add_free(at)
        self._release_empty()

    def _add_free(self, at: int) -> None:
        """A slab stays: what of it is not taken can be."""
        self._free[:0] = [chunk for chunk in reversed(self._slabs[at].chunks) if chunk not in self._taken[at]]

    def _release_empty(self) -> None:
        """Give slabs back of which nobody has a chunk any more, in the background: unpinning takes time.

        One that was to stay goes as well as another: then that one stays. Otherwise memory would wait for the
        very sequences that had it when the order came, while others end.
        """
        for at in [at for at, taken in self._taken.items() if not taken]:
            if not self._leaving:
                break
            if at not in self._leaving:
                size = len(self._slabs[at].chunks)
                others = [one for one in self._leaving if len(self._slabs[one].chunks) <= size]
                if not others:
                    continue
                kept = max(others, key=lambda one: len(self._taken[one]))
                self._leaving.remove(kept)
                self._add_free(kept)
                self._free = [chunk for chunk in self._free if chunk // self.slab_chunks != at]
            self._leaving.discard(at)
            del self._taken[at]
            held = self._slabs.pop(at)
            self._released.append((self._worker.submit(held.slab.free), len(held.chunks)))

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
