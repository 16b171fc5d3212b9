"""Prompts computed in room for two layer groups: one leaves for the balloon while the next is computed.

LayerKV (section 3.1): a prompt that is computed in one piece needs the KV of a layer only while that layer
is computed. So a *staging slot* backs its even layer groups with the same chunks, and its odd ones with the
same others, which is what virtual memory can do: kernels see a slot like any other. Before a group is
computed, the copy of the one before the last has to have ended; the device waits for that, the host does not.

The sequence ends parked, and comes back as any parked one does.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence

from engine.errors import DriverError
from engine.memory.backing import Backing
from engine.memory.chunks import ChunkPool
from engine.memory.copies import Direction, Ticket
from engine.memory.host_rows import HostRow
from engine.memory.kv_cache import KvCache
from engine.memory.kv_slots import KvSlots
from engine.memory.parking import Parking
from engine.memory.virtual_tensor import VirtualTensor

logger = logging.getLogger(__name__)

_NUM_SETS = 2  # of chunks: one is written while the other is copied


class Offload:
    """The KV of one prompt on its way to the balloon, layer group by layer group, while a step computes it.

    A runner tells it where it is, in the order of the device's stream. It is the ticket of all its copies.

    Attributes:
        rows: in the balloon.
        slot: the staging slot.
    """

    def __init__(
        self,
        kv: KvCache,
        slot: int,
        parking: Parking,
        rows: list[HostRow],
        busy: list[Ticket | None],
    ) -> None:
        self.slot = slot
        self._kv, self._parking = kv, parking
        self.rows = rows
        self._busy = busy  # the newest copy out of each set of chunks, of whatever prompt
        self._tickets: list[Ticket] = []

    def before(self, layer: int) -> None:
        """A layer is about to be launched."""
        group, at = divmod(layer, self._kv.geometry.layers_per_group)
        ticket = self._busy[group % len(self._busy)]
        if at == 0 and ticket is not None:
            self._parking.copies.hold_steps(ticket)

    def after(self, layer: int) -> None:
        """What writes and reads a layer's keys and values has been launched."""
        geometry = self._kv.geometry
        if (layer + 1) % geometry.layers_per_group and layer + 1 < geometry.num_layers:
            return
        group = layer // geometry.layers_per_group
        numbers = range(len(self.rows))
        ticket = self._parking.link.submit(Direction.OUT, self.slot, numbers, self.rows, True, [group])
        self._tickets.append(ticket)
        self._busy[group % len(self._busy)] = ticket

    @property
    def is_done(self) -> bool:
        """Whether all copies have ended: they do so in their order."""
        return not self._tickets or self._tickets[-1].is_done

    def wait(self) -> None:
        """Return when all copies have ended.

        Raises:
            DriverError: one of them failed.
        """
        errors = []
        for ticket in self._tickets:
            try:
                ticket.wait()
            except DriverError as error:
                errors.append(error)
        if errors:
            raise errors[0]


class LayerWise:
    """The staging slot. It keeps its chunks until `release`.

    Args:
        kv, slots, chunks, parking: of the pool.
    """

    def __init__(self, kv: KvCache, slots: KvSlots, chunks: ChunkPool, parking: Parking) -> None:
        self._kv = kv
        self._slots = slots
        self._chunks = chunks
        self._parking = parking
        self._num_sets = min(_NUM_SETS, kv.geometry.num_groups)
        self._slot: int | None = None
        self._num_rows = 0
        self._busy: list[Ticket | None] = [None] * self._num_sets

    def num_missing(self, num_tokens: int) -> int:
        """Chunks that the staging slot lacks for a prompt of that length."""
        return self._num_sets * max(0, self._kv.geometry.rows_for(num_tokens) - self._num_rows)

    def begin(self, backing: Backing, num_tokens: int) -> Offload | None:
        """Host rows for a prompt of that length, and where to compute it; None if there is not both."""
        if self._slot is None:
            self._slot = self._slots.set_aside()
        count, parking = self._kv.geometry.rows_for(num_tokens), self._parking
        rows = None if self._slot is None else parking.take_rows(count, backing)
        if self._slot is None or rows is None:
            return None
        return Offload(self._kv, self._slot, parking, rows, self._busy)

    def cancel(self, offload: Offload) -> None:
        """It was not launched, or not to its end: nothing of the prompt is kept."""
        self._wait(offload)
        self._parking.host.release(offload.rows)

    def grow(self, num_tokens: int) -> bool:
        """Back the slot for a prompt of that length, from free chunks; False if that cannot be."""
        rows = self._kv.geometry.rows_for(num_tokens)
        if self._slot is None or rows <= self._num_rows:
            return self._slot is not None
        count, first = rows - self._num_rows, self._kv.first_row(self._slot)
        taken = self._chunks.take(self._num_sets * count, "activation")  # as what a step computes in
        if taken is None:
            return False
        places, done = range(first + self._num_rows, first + rows), 0
        try:
            for done in range(self._num_sets):
                chunks = taken[done * count : (done + 1) * count]
                self._back(self._kv.tensors[done :: self._num_sets], places, chunks)
        except DriverError as error:
            logger.warning("a prompt is not computed layer-wise: %s", error)
            self._chunks.put_back(taken[(done + 1) * count :])
            for at in range(done):
                self._drop(self._kv.tensors[at :: self._num_sets], places)
            for ticket in self._busy:
                if ticket is not None:
                    self._wait(ticket)
            self.release()  # something may still be mapped there: another slot next time
            return False
        self._num_rows = rows
        return True

    def release(self) -> None:
        """Let go of the slot and its chunks, unless they are being copied."""
        if self._slot is None or any(ticket is not None and not ticket.is_done for ticket in self._busy):
            return
        first = self._kv.first_row(self._slot)
        self._drop(self._kv.tensors, range(first, first + self._num_rows))
        self._slots.give_back(self._slot)
        self._slot, self._num_rows, self._busy = None, 0, [None] * self._num_sets

    def _back(self, tensors: Sequence[VirtualTensor], places: range, chunks: Sequence[int]) -> None:
        """Back these places of several tensors with the same chunks.

        Raises:
            DriverError: nothing is backed, and the chunks are free again.
        """
        try:
            tensors[0].map(places, chunks)
        except DriverError:
            self._chunks.put_back(chunks)
            raise
        for at, tensor in enumerate(tensors[1:], 1):
            try:
                tensor.alias(places, chunks)
            except DriverError:
                self._drop(tensors[:at], places)
                raise

    @staticmethod
    def _wait(ticket: Ticket) -> None:
        with contextlib.suppress(DriverError):
            ticket.wait()

    def _drop(self, tensors: Sequence[VirtualTensor], places: range) -> None:
        for tensor in tensors:
            tensor.drop(places)
        self._chunks.settle()
