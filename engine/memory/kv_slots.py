"""Slots of sequences: opened on what there is of a prompt, closed to be kept, given up for others."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from engine.errors import DriverError
from engine.memory.blocks import Match, Opened, TokenChain
from engine.memory.chunks import ChunkPool
from engine.memory.free_slots import FreeSlots
from engine.memory.kv_cache import KvCache
from engine.memory.prefix import PrefixCache
from engine.memory.virtual_tensor import VirtualTensor
from engine.messages import BlockCopy

logger = logging.getLogger(__name__)


class KvSlots:
    """Who is in which slot, and what of its KV is there.

    Args:
        kv: the slots' address ranges.
        chunks: the pool they are backed from.
        caches_prefixes: whether KV outlives its sequence.
        is_static: every slot is backed for good.

    Attributes:
        prefixes: the books of blocks.
        num_tokens: of each slot, tokens whose KV a live sequence has there.
    """

    def __init__(self, kv: KvCache, chunks: ChunkPool, caches_prefixes: bool, is_static: bool) -> None:
        self._kv = kv
        self._chunks = chunks
        self._is_static = is_static
        self._per_block = kv.geometry.tokens_per_chunk
        self._free_slots = FreeSlots(kv)
        self.num_tokens = [0] * kv.num_slots
        self.prefixes = PrefixCache(self._per_block, caches_prefixes and not is_static)

    @property
    def num_free(self) -> int:
        """Slots that `open` could give out."""
        return len(self._free_slots) + self.prefixes.num_closed

    @property
    def num_evictable(self) -> int:
        """Chunks with KV that no live sequence reads."""
        return self.prefixes.num_evictable * self._kv.geometry.num_groups

    def unprepared(self, num_tokens: int) -> list[tuple[VirtualTensor, int]]:
        """What to map so that a prompt of that length could start in an empty slot without a driver call."""
        num_rows = min(self._kv.geometry.rows_for(num_tokens), self._kv.rows_per_slot)
        slot = self._free_slots.spare(num_rows)
        return [] if slot is None else self._kv.empty_places(slot, num_rows)

    def chunks_to_open(self, match: Match | None, num_tokens: int) -> int:
        """Chunks that room for KV loses if a sequence of that length is opened on a match, in the end."""
        if self._is_static:
            return 0
        blocks = self._kv.geometry.rows_for(num_tokens)
        if match is not None:
            blocks = max(0, blocks - match.num_backed) + match.num_revived
        return blocks * self._kv.geometry.num_groups

    def open(self, match: Match | None, chain: TokenChain, num_tokens: int) -> Opened | None:
        """A slot for a sequence of so many tokens, on what there is of it; None if there is no slot.

        Best fit (eLLM): the fewest warm rows that still cover the sequence.
        """
        if match is not None and match.is_in_place:
            self.prefixes.continue_in(match)
            opened = self._describe(match.slot, match.num_tokens)
        else:
            held = self.prefixes.hold(match.slot, match.num_blocks + 1) if match else []
            slot = self._empty_slot(match.num_blocks if match else 0, self._kv.geometry.rows_for(num_tokens))
            opened_or_none = None if slot is None else self._open_empty(slot, match)
            self.prefixes.release(held)
            if opened_or_none is None:
                # Every slot may hold what the match needs: then without it, rather than never.
                return None if match is None else self.open(None, chain, num_tokens)
            opened = opened_or_none
        self.prefixes.plan(opened.slot, chain, min(num_tokens // self._per_block, len(chain.digests)))
        return opened

    def close(self, slot: int, chain: TokenChain, tokens: Sequence[int]) -> None:
        """Give a slot back, with KV of `tokens` in it. It is kept until somebody needs the memory."""
        self.num_tokens[slot] = 0
        num_blocks = self.prefixes.close(slot, chain, tokens)
        if not self._is_static:
            self._kv.cut(slot, num_blocks)
        self._remove_if_empty(slot)
        self._chunks.settle()

    def abandon(self, slot: int) -> None:
        """A parked sequence, none of whose KV is on the device, gives up its slot. The rows stay mapped."""
        self._kv.cut(slot, 0)
        self.prefixes.abandon(slot)
        self._free_slots.put(slot)

    def occupy(self, num_rows: int) -> int | None:
        """A slot for a parked sequence to come back into, by best fit; None if there is none."""
        slot = self._empty_slot(0, num_rows)
        if slot is not None:
            self.prefixes.open(slot)
            self._kv.open(slot, 0)
            self._kv.all_absent(slot, num_rows)
        return slot

    def set_aside(self) -> int | None:
        """A slot in which nothing is mapped, for no sequence; None if there is none."""
        return self._free_slots.take_empty()

    def give_back(self, slot: int) -> None:
        """A slot that was set aside is free again."""
        self._free_slots.put(slot)

    def evict(self, num_chunks: int) -> None:
        """Give up blocks that no sequence reads, until so many chunks are free or about to be."""
        left = -(-num_chunks // self._kv.geometry.num_groups)
        while left > 0:
            before = self.prefixes.num_evictable
            for slot in self.prefixes.closed():
                if left > 0 and slot in self.prefixes:  # removing one may remove its source as well
                    count = self.prefixes.num_evictable
                    self._shrink(slot, left)
                    left -= count - self.prefixes.num_evictable
            if self.prefixes.num_evictable == before:
                break  # what is left is read through slots that are in use
        self._chunks.settle()

    def _describe(self, slot: int, num_tokens: int, copy: BlockCopy | None = None) -> Opened:
        books = self.prefixes[slot]
        shared = books.shared * self._per_block
        return Opened(slot, num_tokens, books.source or 0, shared, copy)

    def _empty_slot(self, begin: int, end: int) -> int | None:
        """A slot nobody has, for a sequence with own rows from `begin` to `end`.

        What has to be given up for it is given up now: its rows are still mapped, and in the same slot
        they cost no driver call.
        """
        if not self._is_static:
            self.evict((end - begin) * self._kv.geometry.num_groups - self._chunks.num_spare)
        for slot in self.prefixes.closed() if not self._free_slots else ():
            books = self.prefixes[slot]
            if books.num_pinned(self._per_block) <= books.shared:
                self._shrink(slot, len(books.blocks))
                self._chunks.settle()
            if self._free_slots:
                break
        return self._free_slots.take(begin, end)

    def _open_empty(self, slot: int, match: Match | None) -> Opened:
        books, per_block = self.prefixes.open(slot), self._per_block
        if not self._is_static:
            self._kv.open(slot, 0)
        if match is None:
            return Opened(slot)
        source, shared = self.prefixes.source_of(match)
        ready = sum(block.is_ready for block in self.prefixes[match.slot].blocks[shared : match.num_blocks])
        self._kv.open(slot, shared)
        aliased = self._alias(slot, match.slot, shared, shared + ready)
        self.prefixes.share(slot, match, aliased)
        if shared + aliased < match.num_blocks or match.num_tokens % per_block < max(1, per_block // 4):
            return self._describe(slot, len(books.blocks) * per_block)
        self.prefixes.copy_from(slot, match)
        at = match.num_blocks
        copy = BlockCopy(self._kv.first_row(match.slot) + at, self._kv.first_row(slot) + at)
        return self._describe(slot, match.num_tokens, copy)

    def _alias(self, slot: int, from_slot: int, begin: int, end: int) -> int:
        """Map blocks of another slot into this one; how many could be."""
        if begin == end or not self._kv.can_alias(slot, begin, end):
            return 0
        try:
            self._kv.alias(slot, from_slot, end - begin)
        except DriverError as error:
            logger.warning("a shared prefix is computed again: %s", error)
            self._chunks.settle()
            return 0
        return end - begin

    def _shrink(self, slot: int, num_blocks: int) -> None:
        """Give up a closed slot's last blocks, until that many are nobody's."""
        self._kv.cut(slot, *self.prefixes.shrink(slot, num_blocks))
        self._remove_if_empty(slot)

    def _remove_if_empty(self, slot: int) -> None:
        source = self.prefixes[slot].source
        if self.prefixes.try_remove(slot):
            self._free_slots.put(slot)
            if source is not None:
                self._remove_if_empty(source)
