"""Free chunks on their way to where they will be needed, in the hands of the mapping thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from engine.memory.vmm import Move, Moved, VirtualMemory
from engine.memory.warm_chunks import Place


class Delivery(NamedTuple):
    """One chunk on its way.

    Attributes:
        chunk: None while it has to be made.
        source: where it is mapped until then.
        is_held: for the growth of a sequence, see `WarmChunks`.
    """

    chunk: int | None
    source: Place | None
    target: Place
    is_held: bool


class Deliveries:
    """What the mapping thread has been given and not yet told the end of, in batches.

    Args:
        vm: the driver.
    """

    def __init__(self, vm: VirtualMemory) -> None:
        self._vm = vm
        self._batches: deque[tuple[int, Sequence[Delivery]]] = deque()
        self._num_sent = self._num_held = self._num_made = 0

    def __len__(self) -> int:
        return self._num_sent

    def __iter__(self) -> Iterator[Delivery]:
        return (one for _, batch in self._batches for one in batch)

    @property
    def num_held(self) -> int:
        """Chunks for the growth of a sequence."""
        return self._num_held

    @property
    def num_made(self) -> int:
        """Chunks that are made on the way."""
        return self._num_made

    def send(self, batch: Sequence[Delivery], handles: Mapping[int, int]) -> None:
        """Give a batch to the mapping thread.

        Args:
            handles: the driver's, of chunks.
        """
        moves = []
        for one in batch:
            one.target[0].awaits(one.target[1])
            handle = None if one.chunk is None else handles[one.chunk]
            source = one.source and one.source[0].address_of(one.source[1])
            moves.append(Move(handle, source, one.target[0].address_of(one.target[1])))
        self._batches.append((self._vm.submit(moves), batch))
        self._count(batch, 1)

    def receive(self, wait: bool) -> Iterator[tuple[Delivery, Moved]]:
        """What has come to an end since; with `wait`, everything."""
        while self._batches and (wait or self._vm.is_done(self._batches[0][0])):
            ticket, batch = self._batches.popleft()
            self._count(batch, -1)
            yield from zip(batch, self._vm.collect(ticket), strict=True)

    def _count(self, batch: Sequence[Delivery], by: int) -> None:
        self._num_sent += by * len(batch)
        self._num_held += by * sum(one.is_held for one in batch)
        self._num_made += by * sum(one.chunk is None for one in batch)
