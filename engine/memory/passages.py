"""Rows of the balloon on their way to another engine's, or from there.

Rows that leave are used by their passage as well as by their sequence, so that neither frees what the other
still reads. Rows that come are the passage's until their sequence is parked here. A passage that is not
wanted any more keeps its rows until nothing reads or writes them.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from engine.errors import DriverError
from engine.memory.backing import Backing
from engine.memory.blocks import TokenChain
from engine.memory.copies import Direction, Ticket
from engine.memory.host_rows import HostRow
from engine.memory.kv_stream import KvTransport, Transfer
from engine.memory.parking import Parking
from engine.migration import Door


@dataclass(slots=True, eq=False)
class Passage:
    """Rows of one sequence, from its first on.

    Attributes:
        rows: in this engine's balloon.
        saving: copies of a shared beginning from the device, which have to end first.
        digests: of that beginning, by which others may find it then.
        transfer: of the bytes, once it has begun.
        is_over: it has its rows only until what reads or writes them has ended.
    """

    rows: list[HostRow]
    saving: list[Ticket] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    transfer: Transfer | None = None
    is_over: bool = False

    @property
    def is_saved(self) -> bool:
        """Whether all of it is in the balloon. Raises DriverError if a copy was refused."""
        if not all(ticket.is_done for ticket in self.saving):
            return False
        for ticket in self.saving:
            ticket.wait()
        return True

    @property
    def is_through(self) -> bool:
        """Whether all of it is in both balloons. Raises DriverError if the transfer failed."""
        if self.transfer is None or not self.transfer.is_done:
            return False
        self.transfer.wait()
        return True

    @property
    def is_quiet(self) -> bool:
        """Whether nothing reads or writes the rows."""
        tickets = [*self.saving, *([self.transfer] if self.transfer is not None else [])]
        return all(ticket.is_done for ticket in tickets)


class Passages:
    """All passages of one engine. Used by its thread, between steps.

    Args:
        parking: whose balloon it is.
        transport: moves the bytes.
        tokens_per_block: T.
    """

    def __init__(self, parking: Parking, transport: KvTransport, tokens_per_block: int) -> None:
        self._parking = parking
        self._host = parking.host
        self._transport = transport
        self._per_block = tokens_per_block
        self._passages: list[Passage] = []
        self._leaving: dict[Backing, Passage] = {}

    def is_leaving(self, backing: Backing) -> bool:
        """Whether a parked sequence may be about to go on elsewhere: it is not brought back meanwhile."""
        return backing in self._leaving

    def leave(
        self, backing: Backing, chain: TokenChain, shared_slot: int, shared_tokens: int
    ) -> Passage | None:
        """Begin to gather what a parked sequence consists of; None if the balloon has no room for it.

        Others may read its beginning too: then that is on the device alone, and is copied to the balloon, or
        is found there.

        Args:
            shared_slot, shared_tokens: its first tokens are read through that slot.
        """
        found = self._host.find(chain.digests[: backing.begin])
        self._host.use(found)
        missing = range(len(found), backing.begin)
        taken = self._parking.take_rows(len(missing), backing)
        if taken is None:
            self._host.release(found)
            return None
        rest = backing.rows[: backing.end - backing.begin]
        self._host.use(rest)
        saving = self._save(missing, taken, backing.slot, shared_slot, shared_tokens // self._per_block)
        passage = Passage([*found, *taken, *rest], saving, chain.digests[: backing.begin])
        self._passages.append(passage)
        self._leaving[backing] = passage
        return passage

    def come(self, count: int) -> tuple[Passage, tuple[Door, ...]] | None:
        """Take so many rows for a sequence of another engine, and open a door for them; None if the balloon
        has too few.

        Raises:
            DriverError: there is no socket to be had.
        """
        rows = self._parking.take_rows(count, Backing())
        if rows is None:
            return None
        passage = Passage(rows)
        self._passages.append(passage)
        try:
            doors, passage.transfer = self._transport.listen(self._addresses(rows))
        except DriverError:
            self.end(passage)
            raise
        return passage, doors

    def send(self, passage: Passage, doors: Sequence[Door]) -> None:
        """All of it is in the balloon: send it through these doors, one a rank."""
        for row, digest in zip(passage.rows, passage.digests, strict=False):
            self._host.remember(row, digest)
        passage.transfer = self._transport.send(doors, self._addresses(passage.rows))

    def arrived(self, passage: Passage, backing: Backing) -> None:
        """Its sequence is parked here: the rows are the sequence's."""
        if passage.transfer is None:
            raise ValueError("nothing has come")
        self._passages.remove(passage)
        self._parking.receive(backing, passage.rows, passage.transfer)

    def end(self, passage: Passage) -> None:
        """It is not wanted any more, or has done its work."""
        passage.is_over = True
        if passage.transfer is not None:
            passage.transfer.cancel()
        self._leaving = {backing: one for backing, one in self._leaving.items() if one is not passage}
        self.settle()

    def lost(self, backing: Backing) -> None:
        """A sequence has ended, or lost its KV: what is copied from the device is about to be others'."""
        if (passage := self._leaving.get(backing)) is not None:
            for ticket in passage.saving:
                with contextlib.suppress(DriverError):
                    ticket.wait()
            self.end(passage)

    def settle(self) -> None:
        """Release rows of passages that are over, as soon as nothing reads or writes them."""
        for passage in [one for one in self._passages if one.is_over and one.is_quiet]:
            self._passages.remove(passage)
            self._host.release(passage.rows)

    def users(self) -> Counter[HostRow]:
        """Of rows in the balloon."""
        return Counter(row for passage in self._passages for row in passage.rows)

    def _save(
        self, missing: range, rows: list[HostRow], own_slot: int | None, shared_slot: int, num_shared: int
    ) -> list[Ticket]:
        """Begin to copy rows of these numbers from the device, where others read them too: from the slot that
        the first `num_shared` are read through, and from the one that the sequence keeps for the others.
        """
        split = max(missing.start, min(missing.stop, num_shared)) - missing.start
        parts = ((shared_slot, missing[:split], rows[:split]), (own_slot, missing[split:], rows[split:]))
        return [
            self._parking.link.submit(Direction.OUT, slot, numbers, some, after_steps=False)
            for slot, numbers, some in parts
            if slot is not None and numbers
        ]

    def _addresses(self, rows: Iterable[HostRow]) -> list[int]:
        return [self._parking.balloon.address_of(chunk) for row in rows for chunk in row.chunks]
