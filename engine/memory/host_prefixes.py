"""The prefix cache goes on in the balloon: blocks that the device gives up are found, and brought back.

Three things fill it. What a sequence had in the balloon when it ended stays there, without a copy. Blocks
on the device that nobody reads are copied before their memory is needed, those that will be given up next
first, while the link is idle. And what was brought back stays as well.

A prompt whose beginning is there gets a slot like any other; the rows after those that the device still has
are copied into it, beside the steps, and computed from where they end. On an H100 that takes 2.5 us a token
for an 8B model (128 KiB at 50 GB/s), computing it 25.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.errors import DriverError
from engine.memory.backing import Backing
from engine.memory.blocks import Block, Opened, TokenChain
from engine.memory.chunks import ChunkPool
from engine.memory.copies import Direction, Ticket
from engine.memory.host_rows import HostRow
from engine.memory.kv_cache import KvCache
from engine.memory.kv_slots import KvSlots
from engine.memory.parking import Back, Parking

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Fetch:
    """A copy into a slot that is under way."""

    ticket: Ticket
    begin: int
    rows: Sequence[HostRow]


@dataclass(slots=True)
class _Save:
    """A copy of blocks of a closed slot that is under way."""

    ticket: Ticket
    rows: list[HostRow]
    digests: list[bytes]
    held: Sequence[Block]


class HostPrefixes:
    """Finds beginnings of prompts in the balloon, and keeps it supplied.

    Args:
        kv, slots, chunks, parking: of the pool.
        back: backs rows, or none of them, with whatever can be given up for them.
    """

    def __init__(self, kv: KvCache, slots: KvSlots, chunks: ChunkPool, parking: Parking, back: Back) -> None:
        self._kv = kv
        self._slots = slots
        self._chunks = chunks
        self._parking = parking
        self._host = parking.host
        self._back = back
        self._per_block = kv.geometry.tokens_per_chunk
        self._fetches: dict[Backing, _Fetch] = {}
        self._save: _Save | None = None
        # Closed slots, when they were last used, and how many of their blocks were looked at. Each is saved
        # once: a small balloon would otherwise be filled again and again by what it has just given up.
        self._looked: dict[int, tuple[int, int]] = {}
        self._settled_at = -1  # `num_uses` when nothing was left to save: a look at all slots takes 0.5 ms

    @property
    def is_fetching(self) -> bool:
        """Whether a prompt waits for its beginning."""
        return bool(self._fetches)

    @property
    def is_saving(self) -> bool:
        """Whether blocks are on their way to the balloon."""
        return self._save is not None

    def num_found(self, chain: TokenChain, num_tokens: int, num_known: int) -> int:
        """Tokens of a sequence that the balloon has, after so many that are known to be on the device.

        At least one token is left to compute: its logits choose the next.
        """
        begin = num_known // self._per_block
        end = begin + len(self._find(chain, num_tokens, begin))
        return max(0, end * self._per_block - num_known)

    def adopt(self, backing: Backing, opened: Opened, chain: TokenChain) -> None:
        """What a sequence found in its slot, and the balloon has as well, need not be copied there again."""
        begin = self._slots.prefixes.num_kept(opened.slot)
        rows = self._host.find(chain.digests[begin : opened.num_tokens // self._per_block])
        if rows:
            self._parking.found(backing, begin, rows)

    def fetch(self, backing: Backing, opened: Opened, chain: TokenChain, num_tokens: int) -> Opened | None:
        """Begin to copy what the balloon has of a sequence into the slot that was opened for it.

        Args:
            num_tokens: of the sequence.

        Returns:
            The slot with what it holds meanwhile: nothing may be computed in it until `arrived`. None if
            nothing is found, or there is no room for it now: then all is as it was.
        """
        slot, begin = opened.slot, opened.num_tokens // self._per_block
        rows = self._find(chain, num_tokens, begin)
        if not rows:
            return None
        end = (begin + len(rows)) * self._per_block
        # What waits for a step may be backed at once, but not be written by another stream; and the step in
        # flight when a sequence ended may still write behind what is kept of it, where this one goes on.
        after_steps = self._chunks.num_retiring > 0 or opened.num_tokens % self._per_block > 0
        if not self._back(self._kv.missing(slot, end), False, math.inf):
            return None
        self._kv.grown(slot, end)
        self._slots.prefixes.copied(slot)  # of a block in part: now all of it comes
        numbers = range(begin, begin + len(rows))
        backing.coming = self._parking.link.submit(Direction.IN, slot, numbers, rows, after_steps)
        self._host.use(rows)
        self._fetches[backing] = _Fetch(backing.coming, begin, rows)
        self._slots.num_tokens[slot] = begin * self._per_block
        return replace(opened, num_tokens=begin * self._per_block, copy=None)

    def arrived(self, backing: Backing, slot: int, chain: TokenChain) -> int | None:
        """Tokens that are in the slot of a sequence whose beginning was fetched; None while it is under way.

        After a failed copy those that were there before: the others are computed.
        """
        fetch = self._fetches[backing]
        if not fetch.ticket.is_done:
            return None
        backing.coming = None
        del self._fetches[backing]
        end = fetch.begin
        try:
            fetch.ticket.wait()
        except DriverError as error:
            logger.warning("a prefix was not copied back, and is computed again: %s", error)
        else:
            end += len(fetch.rows)
            self._parking.found(backing, fetch.begin, fetch.rows)
            self._slots.prefixes.computed(slot, end * self._per_block)
            self._slots.prefixes.known(slot, chain)
        self._host.release(fetch.rows)
        self._slots.num_tokens[slot] = end * self._per_block
        return end * self._per_block

    def save(self, num_bytes: int) -> None:
        """Begin to copy blocks of the closed slot that is given up next to the balloon, which lacks them.

        Args:
            num_bytes: to copy at most.
        """
        prefixes = self._slots.prefixes
        most = min(num_bytes // self._host.row_bytes, self._host.num_spare)
        if self._save is not None or not most or self._settled_at == prefixes.num_uses:
            return
        is_settled = True
        for slot in prefixes.closed():
            books = prefixes[slot]
            lacking = self._lacking(slot)
            if not lacking:
                busy = (at for at, block in enumerate(books.blocks) if block.users)
                self._looked[slot] = books.last_used, next(busy, len(books.blocks))
            elif max(books.blocks[at].read_until for at, _ in lacking) <= self._chunks.completed:
                self._copy_out(slot, lacking[:most])
                return
            else:
                is_settled = False  # once its steps have ended
        if is_settled:
            self._settled_at = prefixes.num_uses

    def settle(self) -> None:
        """Take in what has ended."""
        for backing in [one for one, fetch in self._fetches.items() if one.coming is not fetch.ticket]:
            self._host.release(self._fetches.pop(backing).rows)  # its sequence has ended, or lost its slot
        save = self._save
        if save is None or not save.ticket.is_done:
            return
        self._save = None
        try:
            save.ticket.wait()
            for row, digest in zip(save.rows, save.digests, strict=True):
                self._host.remember(row, digest)
        except DriverError as error:
            logger.warning("a prefix was not copied to the host: %s", error)
        self._host.release(save.rows)
        self._slots.prefixes.release(save.held)

    def forget_idle(self) -> None:
        """Give up all that no sequence uses."""
        self._host.forget_idle()
        self._looked.clear()
        self._settled_at = -1

    def wait(self) -> bool:
        """Wait for the oldest beginning that a prompt waits for, or else for what is being saved; False if
        there is nothing to wait for.
        """
        tickets = [fetch.ticket for fetch in self._fetches.values()]
        tickets += [] if self._save is None else [self._save.ticket]
        for ticket in tickets[:1]:
            with contextlib.suppress(DriverError):
                ticket.wait()
        return bool(tickets)

    def users(self) -> Counter[HostRow]:
        """Of rows in the balloon, copies under way."""
        rows = [*([] if self._save is None else self._save.rows)]
        return Counter([*rows, *(row for fetch in self._fetches.values() for row in fetch.rows)])

    def _find(self, chain: TokenChain, num_tokens: int, begin: int) -> list[HostRow]:
        """Rows of a sequence that the balloon has, from the `begin`th on."""
        return self._host.find(chain.digests[begin : (num_tokens - 1) // self._per_block])

    def _lacking(self, slot: int) -> list[tuple[int, bytes]]:
        """Own blocks of a closed slot, of those not yet looked at, that nobody reads and the balloon has not:
        where, and by which hash.
        """
        books = self._slots.prefixes[slot]
        last_used, begin = self._looked.get(slot, (0, 0))
        begin = max(books.shared, begin if last_used == books.last_used else 0)
        return [
            (at, block.digest)
            for at, block in enumerate(books.blocks[begin:], begin)
            if block.digest is not None and not block.users and block.digest not in self._host
        ]

    def _copy_out(self, slot: int, blocks: Sequence[tuple[int, bytes]]) -> None:
        rows = self._host.take(len(blocks))
        if rows is None:
            return
        numbers = [at for at, _ in blocks]
        ticket = self._parking.link.submit(Direction.OUT, slot, numbers, rows, after_steps=False)
        self._looked[slot] = self._slots.prefixes[slot].last_used, blocks[-1][0] + 1
        held = self._slots.prefixes.hold(slot, blocks[-1][0] + 1)
        self._save = _Save(ticket, rows, [digest for _, digest in blocks], held)
