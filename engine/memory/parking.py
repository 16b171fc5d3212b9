"""Sequences that give their place on the device to others for a while, and come back (LayerKV 3.2, eLLM 4.3).

KV is append-only, so a row of a slot that is full never changes: its copy in the balloon stays valid, and
may be made ahead, while the link has nothing else to do (*write-through*). A sequence that is parked has
every row in the balloon that nobody else reads; what of them is still on the device as well is a matter of
room alone, layer group by layer group. Groups that have left are brought back, into the slot it kept or
into another one, before the sequence computes again. All bytes come back as they were: what a sequence
says does not depend on whether it was parked.

Rows are let go of when their copy has ended, never before, so nothing is unmapped under a copy.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.errors import ConservationError, DriverError
from engine.memory.backing import Backing
from engine.memory.blocks import TokenChain
from engine.memory.chunks import ChunkPool
from engine.memory.copies import Copies, Direction, Ticket
from engine.memory.host_rows import HostRow, HostRows
from engine.memory.kv_cache import KvCache
from engine.memory.kv_slots import KvSlots
from engine.memory.row_copies import RowCopies
from engine.memory.virtual_tensor import VirtualTensor

logger = logging.getLogger(__name__)

Back = Callable[[Sequence[tuple[VirtualTensor, int]], bool, float], bool]


@dataclass(slots=True)
class _Out:
    """A copy to the balloon that is under way."""

    ticket: Ticket
    backing: Backing
    rows: list[HostRow]


class Parking:
    """Moves KV of whole sequences between the device and the balloon.

    Args:
        kv, slots, chunks: of the pool.
        host: rows in the balloon.
        copies: the link.
        room: chunks that a sequence which comes back may take; of all there is, if nobody else can go on.
        back: backs rows, or none of them, with whatever can be given up for them; whether alone, `step_s`.
    """

    def __init__(
        self,
        kv: KvCache,
        slots: KvSlots,
        chunks: ChunkPool,
        host: HostRows,
        copies: Copies,
        room: Callable[[bool], int],
        back: Back,
    ) -> None:
        self._kv = kv
        self._slots = slots
        self._chunks = chunks
        self.host = host
        self.balloon = host.balloon
        self.copies = copies
        self.link = RowCopies(kv, host, copies)
        self._room = room
        self._back = back
        self._groups = kv.geometry.num_groups
        # LayerKV 3.2.1: every other group goes first, so that those that stay lie between those that left.
        self._order = [*range(0, self._groups, 2), *range(1, self._groups, 2)]
        self._outs: deque[_Out] = deque()
        self._parked: list[Backing] = []  # settled, and not on their way back; the last is evicted first
        self._saved: dict[Backing, None] = {}  # in the order in which they were first saved
        self.num_leaving = 0
        self.num_idle = 0
        copies.keep(host.balloon, chunks.vm)

    @property
    def is_moving(self) -> bool:
        """Whether a sequence is on its way to the balloon."""
        return any(out.backing.is_leaving for out in self._outs)

    @property
    def is_copying(self) -> bool:
        """Whether anything is."""
        return bool(self._outs)

    def save(self, backing: Backing, slot: int, num_tokens: int, num_bytes: int) -> int:
        """Begin to copy full rows of a live sequence to the balloon, ahead of need, if there is room that
        nobody else has; bytes under way for it.

        Args:
            num_tokens: whose KV is in the slot, written by steps that have ended. A copy that waits for a
                step makes maps wait for it too: 280 to 550 ms behind pieces of long prompts (H100).
            num_bytes: to copy at most.
        """
        end = num_tokens // self._kv.geometry.tokens_per_chunk
        if end <= backing.saved_until and not backing.begin:
            return 0  # as mostly: a look at its blocks would cost more than this
        self._begin_at(backing, self._slots.prefixes.num_kept(slot))
        most = min(num_bytes // self.host.row_bytes, self.host.num_spare)
        end = min(end, backing.saved_until + most)
        return (self._copy_out(backing, slot, end, after_steps=False) or 0) * self.host.row_bytes

    def park(self, backing: Backing, slot: int, num_tokens: int, num_chunks: int) -> bool:
        """Begin to move a live sequence off the device. It must not be in a step from now on.

        Args:
            num_tokens: whose KV is in the slot, or will be when the launched steps have ended.
            num_chunks: how many to free; whole layer groups leave.

        Returns:
            False if the balloon has no room for it: nothing has changed.
        """
        self._wait_for(backing)
        end = self._kv.geometry.rows_for(num_tokens)
        keep = self._slots.prefixes.num_kept(slot)
        if keep >= end:
            return False  # others read all of it
        self._begin_at(backing, keep)
        if self._copy_out(backing, slot, end, after_steps=True) is None:
            return False
        self._kv.cut(slot, end)
        self._slots.prefixes.park(slot, keep)
        backing.slot, backing.first, backing.end = slot, keep, end
        backing.is_parked = backing.is_leaving = True
        backing.read_until = self._slots.prefixes.newest_step
        self._slots.num_tokens[slot] = 0
        backing.num_to_leave = min(self._groups, -(-num_chunks // (end - keep)))
        self.num_leaving += backing.num_to_leave * backing.num_rows
        if backing.saved_until == end:
            self._left(backing)
        return True

    def receive(self, backing: Backing, rows: list[HostRow], ticket: Ticket) -> None:
        """A sequence was computed right into the balloon: it is parked, with nothing on the device.

        Args:
            rows: from `take_rows`.
            ticket: of the copies; if they fail the sequence is lost.
        """
        backing.end, backing.absent = len(rows), set(range(self._groups))
        backing.is_parked = backing.is_leaving = True
        self._outs.append(_Out(ticket, backing, rows))

    def settle(self) -> None:
        """Take in what has ended: rows whose copy is made, memory that can be let go of."""
        self.balloon.grow_ahead()
        while self._outs and self._outs[0].ticket.is_done:
            self._out_ended(self._outs.popleft())

    def wait(self) -> None:
        """Wait for the oldest copy to the balloon."""
        if self._outs:
            self._out_ended(self._outs.popleft())

    def num_idle_of(self, backing: Backing) -> int:
        """Chunks of a parked sequence that are on the device, and could be had by others."""
        return 0 if backing.is_leaving else (self._groups - len(backing.absent)) * backing.num_rows

    def num_lacking(self, backing: Backing, num_reserved: int, is_alone: bool = False) -> int:
        """Chunks that there is too little room for a parked sequence to come back, and so many others."""
        room = self._room(is_alone) - self.num_idle_of(backing)
        return len(backing.absent) * backing.num_rows + num_reserved - room

    def bring_back(
        self, backing: Backing, num_reserved: int, is_alone: bool = False, step_s: float = math.inf
    ) -> bool:
        """Begin to copy a parked sequence back.

        Args:
            num_reserved: chunks of room to leave.
            is_alone: nobody else can go on, so that nothing has to be left to prompts.
            step_s: how long steps take, beside which memory is mapped.

        Returns:
            False if there is no room, or no slot, for it now, or if it takes longer to map than a step.
        """
        if backing.is_leaving or self.num_lacking(backing, num_reserved, is_alone) > 0:
            return False
        self._parked.remove(backing)
        self.num_idle -= self.num_idle_of(backing)
        backing.slot = self._slot_of(backing)
        if backing.slot is None or not self._fetch(backing, backing.slot, is_alone, step_s):
            self._stays(backing, is_next=True)  # what it still has goes last: it is the next to come
            if math.isinf(step_s):
                self._leave_slot(backing)  # where nothing is being mapped
            return False
        return True

    def is_back(self, backing: Backing) -> bool:
        """Whether a sequence that was brought back is wholly on the device again, or `is_lost`."""
        if backing.coming is None or not backing.coming.is_done:
            return False
        self._arrive(backing)
        return True

    def returned(self, backing: Backing, chain: TokenChain, num_tokens: int) -> int:
        """A sequence is on the device again, with KV of so many tokens, and will write on; its slot."""
        slot, backing.slot = backing.slot, None
        if slot is None:
            raise ConservationError("a sequence came back into no slot")
        backing.is_parked = backing.has_failed = False
        self._slots.num_tokens[slot] = num_tokens
        self._slots.prefixes.computed(slot, num_tokens)
        self._slots.prefixes.known(slot, chain)
        self._forget(backing, max(0, num_tokens // self._kv.geometry.tokens_per_chunk - backing.begin))
        return slot

    @staticmethod
    def wait_back(backing: Backing) -> None:
        """Wait until a sequence that was brought back has arrived; `is_back` says how that ended."""
        if backing.coming is not None:
            with contextlib.suppress(DriverError):
                backing.coming.wait()

    def evict(self, num_chunks: int) -> None:
        """Let layer groups of parked sequences go that are still on the device, until so many are free."""
        for backing in self._parked[::-1]:
            if num_chunks <= 0:
                break
            count = min(self._groups - len(backing.absent), -(-num_chunks // backing.num_rows))
            self._drop_groups(backing, count)
            self.num_idle -= count * backing.num_rows
            num_chunks -= count * backing.num_rows
            self._leave_slot(backing)
        self._chunks.settle()

    def found(self, backing: Backing, begin: int, rows: Sequence[HostRow]) -> None:
        """A sequence got its rows from `begin` on out of these: if it is parked, they need no copy."""
        self._begin_at(backing, begin)
        more = rows[backing.saved_until - begin :]
        self.host.use(more)
        backing.rows += more
        self._saved[backing] = None

    def discard(self, backing: Backing, chain: TokenChain, num_tokens: int) -> tuple[int | None, int]:
        """The sequence has ended, or lost its KV. What the balloon has of it is kept for others to find, as
        long as there is room.

        Args:
            chain: hashes of its blocks.
            num_tokens: whose KV is what it should be; 0 if none of it may be found.

        Returns:
            The slot that a parked one still has, to be closed, and the tokens whose KV is there.
        """
        self._wait_for(backing)
        if backing.coming is not None:
            self._arrive(backing)
        if backing in self._parked:
            self._parked.remove(backing)
            self.num_idle -= self.num_idle_of(backing)
        backing.is_parked = backing.has_failed = backing.is_lost = False
        num_full = num_tokens // self._kv.geometry.tokens_per_chunk
        digests = chain.digests[backing.begin : num_full]
        for row, digest in zip(backing.rows, digests, strict=False):
            self.host.remember(row, digest)
        self._forget(backing)
        slot, backing.slot = backing.slot, None
        return slot, backing.first * self._kv.geometry.tokens_per_chunk

    def users(self) -> Counter[HostRow]:
        """Of rows in the balloon, sequences and copies that are leaving."""
        rows = [backing.rows for backing in self._saved] + [out.rows for out in self._outs]
        return Counter(row for some in rows for row in some)

    def check(self) -> None:
        """Raise ConservationError unless the counts agree."""
        idle = sum(map(self.num_idle_of, self._parked))
        moving = [out.backing for out in self._outs if out.backing.is_leaving]
        leaving = sum(one.num_to_leave * one.num_rows for one in moving)
        if (idle, leaving) != (self.num_idle, self.num_leaving):
            raise ConservationError(
                f"parked: {idle} idle, {leaving} leaving; {self.num_idle}, {self.num_leaving} counted"
            )

    def _copy_out(self, backing: Backing, slot: int, end: int, after_steps: bool) -> int | None:
        """Begin to copy rows up to `end` that the balloon lacks; how many, None if it has no room."""
        begin = backing.saved_until
        if end <= begin:
            return 0
        rows = self.take_rows(end - begin, backing)
        if rows is None:
            return None
        ticket = self.link.submit(Direction.OUT, slot, range(begin, end), rows, after_steps)
        self._outs.append(_Out(ticket, backing, rows))
        return len(rows)

    def take_rows(self, count: int, but_of: Backing) -> list[HostRow] | None:
        """Host rows; if there are too few, those of sequences that are on the device as well."""
        rows = self.host.take(count)
        if rows is not None:
            return rows
        busy = [but_of, *(out.backing for out in self._outs)]
        spare = [one for one in self._saved if not one.is_parked and one not in busy]
        if not self.host.would_do(count, sum(len(one.rows) for one in spare)):
            return None
        while rows is None and spare:
            self._forget(spare.pop(0))
            rows = self.host.take(count)
        return rows

    def _out_ended(self, out: _Out) -> None:
        backing = out.backing
        try:
            out.ticket.wait()
        except DriverError as error:
            logger.warning("KV was not copied to the host, and stays where it is: %s", error)
            self.host.release(out.rows)
            if backing.is_leaving:
                self.num_leaving -= backing.num_to_leave * backing.num_rows
                backing.num_to_leave, backing.is_leaving, backing.has_failed = 0, False, True
                backing.is_lost = backing.slot is None
            return
        backing.rows += out.rows
        self._saved[backing] = None
        if backing.is_leaving:
            self._left(backing)

    def _left(self, backing: Backing) -> None:
        """Everything of a parked sequence is in the balloon: let the groups go that are to leave."""
        count, backing.num_to_leave, backing.is_leaving = backing.num_to_leave, 0, False
        self.num_leaving -= count * backing.num_rows
        self._drop_groups(backing, count)
        self._stays(backing)
        self._leave_slot(backing)
        self._chunks.settle()

    def _stays(self, backing: Backing, is_next: bool = False) -> None:
        self._parked.insert(0 if is_next else len(self._parked), backing)
        self.num_idle += self.num_idle_of(backing)

    def _drop_groups(self, backing: Backing, count: int) -> None:
        if backing.slot is None:
            return
        present = [group for group in self._order if group not in backing.absent]
        for group in present[:count]:
            self._kv.leave(backing.slot, group, backing.first, backing.read_until)
            backing.absent.add(group)

    def _leave_slot(self, backing: Backing) -> None:
        """With nothing on the device, let others have its slot: what is mapped there is used again."""
        if backing.slot is not None and not backing.first and len(backing.absent) == self._groups:
            self._slots.abandon(backing.slot)
            backing.slot = None

    def _slot_of(self, backing: Backing) -> int | None:
        """The slot that a sequence comes back into, which it keeps while it is being mapped. One does so."""
        for other in self._parked if backing.slot is None else ():
            self._leave_slot(other)
        return self._slots.occupy(backing.end) if backing.slot is None else backing.slot

    def _fetch(self, backing: Backing, slot: int, is_alone: bool, step_s: float) -> bool:
        # What still waits for a step to end may be backed at once, but not be written by another stream.
        after_steps = self._chunks.num_retiring > 0
        if not self._back(self._kv.absent(slot), is_alone, step_s):
            return False
        numbers, groups = range(backing.first, backing.end), sorted(backing.absent)
        host = backing.rows[backing.first - backing.begin : backing.end - backing.begin]
        backing.coming = self.link.submit(Direction.IN, slot, numbers, host, after_steps, groups)
        self._kv.returned(slot)
        backing.absent = set()
        return True

    def _arrive(self, backing: Backing) -> None:
        ticket, backing.coming = backing.coming, None
        backing.is_parked = False
        if ticket is not None:
            try:
                ticket.wait()
            except DriverError as error:
                logger.warning("KV was not copied back, and is computed again: %s", error)
                backing.is_lost = True

    def _wait_for(self, backing: Backing) -> None:
        while any(out.backing is backing for out in self._outs):
            self.wait()

    def _begin_at(self, backing: Backing, row: int) -> None:
        """Let what the balloon has of a sequence reach from that row, or before, to where it goes on."""
        if not backing.begin <= row <= backing.saved_until:
            self._forget(backing)
            backing.begin = row

    def _forget(self, backing: Backing, begin: int = 0) -> None:
        """Give up the host copies of a sequence's rows from the `begin`th that it has there on."""
        self.host.release(backing.rows[begin:])
        del backing.rows[begin:]
        if not backing.rows:
            self._saved.pop(backing, None)
