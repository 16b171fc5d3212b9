"""KV that outlives its sequence, for prompts that begin alike (vTensor's prefix sharing).

A block is the KV of T tokens in every layer: one row of a slot. Blocks are found by a chain of hashes,
each over the hash before and the block's tokens, so that equal hashes mean equal prefixes. What can
happen to a prompt whose beginning is there:

    in place    a finished conversation goes on in its own slot: nothing is copied, no driver call
    shared      its first tokens are read through the slot that holds them (its *source*)
    aliased     where the slot that holds them reads its own beginning through another one: its source is
                taken over, and the blocks in its own rows are mapped once more, into the new slot
    copied      the tokens that agree within the block after those

Blocks that are full never change. A slot is live while a sequence writes to it, and closed afterwards:
its blocks are kept until memory is short, and given up from the end, the slot used least recently
first; what a waiting request will read goes last (`Slot.worth`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from engine.errors import ConservationError
from engine.memory.blocks import Block, Match, Slot, TokenChain, Tokens

NO_DRAFT = -1  # nothing is there but what has been launched
_MAX_CANDIDATES = 64  # slots that end alike and are compared token by token, some 6 us each


class PrefixCache:
    """Which slot holds which blocks. Knows nothing of chunks: who calls it maps and unmaps.

    Args:
        tokens_per_block: T.
        is_enabled: otherwise nothing outlives its sequence.

    Attributes:
        num_evictable: blocks that no live sequence reads.
        num_closed: slots without a sequence.
        newest_step: the step launched last, which may read everything live.
    """

    def __init__(self, tokens_per_block: int, is_enabled: bool) -> None:
        self._per_block = tokens_per_block
        self.is_enabled = is_enabled
        self._slots: dict[int, Slot] = {}
        self._index: dict[bytes, Block] = {}
        self._tails: dict[bytes, set[int]] = {}
        self._clock = 0
        self.num_evictable = 0
        self.num_closed = 0
        self.newest_step = 0

    @property
    def num_uses(self) -> int:
        """Counts up whenever a slot is closed, or read by another."""
        return self._clock

    def __getitem__(self, slot: int) -> Slot:
        return self._slots[slot]

    def __contains__(self, slot: int) -> bool:
        return slot in self._slots

    def closed(self) -> list[int]:
        """Slots without a sequence, in the order in which they are given up."""
        slots = self._slots
        closed = [number for number, slot in slots.items() if slot.is_closed]
        return sorted(closed, key=lambda number: slots[number].worth)

    def must_wait(self, chain: TokenChain, match: Match | None, num_tokens: int, draft: int) -> bool:
        """Whether a live sequence is going to compute more of what a prompt needs, after `draft`."""
        at = match.num_blocks if match else 0
        if at >= min((num_tokens - 1) // self._per_block, len(chain.digests)):
            return False
        block = self._index.get(chain.digests[at])
        return block is not None and not block.is_ready and block.draft != draft

    def match(self, chain: TokenChain, tokens: Tokens, num_tokens: int, draft: int) -> Match | None:
        """The longest beginning of a sequence that is there, or will be when `draft` has run.

        At least one token is left to compute: its logits choose the next.
        """
        limit = num_tokens - 1
        found: list[Block] = []
        for digest in chain.digests[: limit // self._per_block]:
            block = self._index.get(digest)
            if block is None or not (block.is_ready or block.draft == draft):
                break
            found.append(block)
        count = len(found)
        candidates = set(found[-1].holders) if found else set()
        candidates |= self._tails.get(chain.after(count), set())
        best: Match | None = None
        for number in sorted(candidates, reverse=True)[:_MAX_CANDIDATES]:
            match = self._compare(number, count, tokens, limit)
            if match and (best is None or _preference(match) > _preference(best)):
                best = match
        return best

    def want(self, slot: int, request_id: str, urgency: tuple[float, str]) -> None:
        """A waiting request will read the slot."""
        self._slots[slot].wanted[request_id] = urgency

    def unwant(self, slot: int, request_id: str) -> None:
        """It will not any more."""
        if slot in self._slots:
            self._slots[slot].wanted.pop(request_id, None)

    def num_wanted(self, but_by: str) -> int:
        """Blocks without users in slots that waiting requests will read, other than that one."""
        slots = [slot for slot in self._slots.values() if slot.is_closed and slot.wanted.keys() - {but_by}]
        return sum(block.users == 0 for slot in slots for block in slot.blocks[slot.shared :])

    def continue_in(self, match: Match) -> None:
        """Make a closed slot live again, at `match.num_tokens`; its blocks from there on are rewritten."""
        slot = self._slots[match.slot]
        self._forget_tail(match.slot)
        slot.tokens = None
        self.num_closed -= 1
        slot.wanted.clear()
        for block in slot.blocks:
            self._use(block)
        for block in slot.blocks[match.num_blocks :]:
            self._forget_digest(block)
            block.is_ready = False
        slot.num_ready = slot.num_known = match.num_blocks

    def open(self, number: int) -> Slot:
        """An empty live slot."""
        if number in self._slots:
            raise ConservationError(f"slot {number} is not free")
        slot = self._slots[number] = Slot()
        return slot

    def source_of(self, match: Match) -> tuple[int, int]:
        """Through which slot a prompt would read, and how many blocks of the match that covers."""
        slot = self._slots[match.slot]
        if slot.source is None:
            return match.slot, match.num_blocks
        return slot.source, min(slot.shared, match.num_blocks)

    def share(self, number: int, match: Match, num_aliased: int) -> None:
        """Let an empty slot read a match: through its source, and `num_aliased` blocks in own rows."""
        source, shared = self.source_of(match)
        slot = self._slots[number]
        slot.blocks = self._slots[match.slot].blocks[: shared + num_aliased]
        slot.pending = [block for block in slot.blocks if not block.is_ready]
        slot.num_ready = slot.num_known = len(slot.blocks)
        if shared:
            slot.source, slot.shared = source, shared
            self._slots[source].readers[number] = shared
        for block in slot.blocks:
            self._use(block)
        for block in slot.blocks[shared:]:
            block.holders.add(number)
        self._touch(match.slot)

    def copy_from(self, number: int, match: Match) -> None:
        """Keep the block whose beginning a new slot copies where it is, until `copied`."""
        self._slots[match.slot].copiers[number] = match.num_tokens
        self._slots[number].copies_from = match.slot
        self._use(self._slots[match.slot].blocks[match.num_blocks])

    def copied(self, number: int) -> None:
        """The copy has been launched, or will not be needed."""
        slot = self._slots[number]
        if slot.copies_from is not None:
            source = self._slots[slot.copies_from]
            num_tokens = source.copiers.pop(number)
            self._unuse(source.blocks[num_tokens // self._per_block])
            slot.copies_from = None

    def plan(self, number: int, chain: TokenChain, num_blocks: int) -> None:
        """Announce the blocks a live sequence is going to compute, so that others wait for them."""
        slot = self._slots[number]
        self._extend(slot, number, num_blocks)
        self._announce(slot, chain, num_blocks)

    def drafted(self, number: int, num_tokens: int, draft: int) -> None:
        """A draft computes a slot up to that many tokens."""
        slot = self._slots[number]
        for block in slot.blocks[slot.num_ready : num_tokens // self._per_block]:
            block.draft = draft

    def is_readable(self, number: int, draft: int) -> bool:
        """Whether everything a slot reads of others is computed, or would be in that draft."""
        slot = self._slots[number]
        slot.pending = [block for block in slot.pending if not block.is_ready]
        return all(block.draft == draft for block in slot.pending)

    def computed(self, number: int, num_tokens: int) -> None:
        """The step that computes a slot up to that many tokens has been launched."""
        slot, full = self._slots[number], num_tokens // self._per_block
        self._extend(slot, number, full)
        for block in slot.blocks[slot.num_ready : full]:
            block.is_ready = True
        slot.num_ready = max(slot.num_ready, full)

    def known(self, number: int, chain: TokenChain) -> None:
        """The tokens of a live sequence's computed blocks are known, and with them their hashes."""
        slot = self._slots[number]
        self._announce(slot, chain, min(slot.num_ready, len(chain.digests)))

    def orphans(self, number: int, num_tokens: int) -> list[int]:
        """Slots that read more of a slot than the tokens it has computed: they wait in vain if it closes."""
        slot = self._slots[number]
        read = {reader: count * self._per_block for reader, count in slot.readers.items()}
        return [reader for reader, count in (*read.items(), *slot.copiers.items()) if count > num_tokens]

    def distrust(self, number: int) -> int:
        """Let nobody else find what a slot computed itself; tokens that others have begun to read of it."""
        slot = self._slots[number]
        for block in slot.blocks[slot.shared :]:
            self._forget_digest(block)
        slot.num_known = max(slot.num_known, len(slot.blocks))
        return max([count * self._per_block for count in slot.readers.values()] + [*slot.copiers.values(), 0])

    def close(self, number: int, chain: TokenChain, tokens: Sequence[int]) -> int:
        """A sequence leaves its slot, which has computed `tokens`; how many blocks stay in it."""
        slot, keep = self._slots[number], len(tokens) if self.is_enabled else 0
        num_blocks = -(-keep // self._per_block)
        self.copied(number)
        self._extend(slot, number, num_blocks)
        self.computed(number, keep)
        self.known(number, chain)
        for block in slot.blocks[keep // self._per_block :]:
            if block.holders == {number}:
                self._forget_digest(block)  # it was announced, and will never be full
        slot.num_known = min(slot.num_known, keep // self._per_block)
        for block in slot.blocks:
            self._unuse(block)
        slot.tokens = tokens[:keep]
        self.num_closed += 1
        self._cut(number, num_blocks)
        if keep % self._per_block:
            slot.tail = chain.after(keep // self._per_block)
            self._tails.setdefault(slot.tail, set()).add(number)
        self._touch(number)
        return len(slot.blocks)

    def num_kept(self, number: int) -> int:
        """Leading blocks of a live slot that stay if its sequence is parked: others read or hold them too."""
        slot, own = self._slots[number], {number}
        also = [at for at, block in enumerate(slot.blocks) if block.users > 1 or block.holders != own]
        return max(slot.num_read(self._per_block), also[-1] + 1 if also else 0)

    def park(self, number: int, keep: int) -> None:
        """The sequence of a live slot leaves the device. All but `num_kept` blocks are taken out of the slot,
        and found by nobody; `computed` and `known` put them back in.
        """
        slot = self._slots[number]
        for block in slot.blocks[keep:]:
            self._unuse(block)
        self._cut(number, keep)
        slot.num_ready, slot.num_known = min(slot.num_ready, keep), min(slot.num_known, keep)

    def abandon(self, number: int) -> None:
        """End the slot of a parked sequence that has nothing in it."""
        slot = self._slots.pop(number)
        if slot.blocks or slot.readers or slot.copiers or slot.source is not None or slot.is_closed:
            raise ConservationError(f"slot {number} is in use and cannot be abandoned")

    def shrink(self, number: int, num_blocks: int) -> tuple[int, int]:
        """Give up a closed slot's last blocks until `num_blocks` more are nobody's, or the others must stay.

        Returns:
            Blocks that the slot has left, and the newest step that may read the others.
        """
        slot, target = self._slots[number], max(0, self.num_evictable - num_blocks)
        pinned, read_until = slot.num_pinned(self._per_block), 0
        while len(slot.blocks) > pinned and self.num_evictable > target:
            read_until = max(read_until, slot.blocks[-1].read_until)
            self._cut(number, len(slot.blocks) - 1)
        return len(slot.blocks), read_until

    def hold(self, slot: int, num_blocks: int) -> Sequence[Block]:
        """Keep a slot's first blocks from being given up, until `release`."""
        held = self._slots[slot].blocks[:num_blocks]
        for block in held:
            self._use(block)
        return held

    def release(self, held: Sequence[Block]) -> None:
        """The end of a `hold`."""
        for block in held:
            self._unuse(block)

    def try_remove(self, number: int) -> bool:
        """End a closed slot that holds no blocks of its own and that nobody reads."""
        slot = self._slots[number]
        if not slot.is_closed or slot.readers or slot.copiers or len(slot.blocks) > slot.shared:
            return False
        self._forget_tail(number)
        if slot.source is not None:
            del self._slots[slot.source].readers[number]
        self.num_closed -= 1
        del self._slots[number]
        return True

    def check(self) -> None:
        """Raise ConservationError unless counts and cross-references agree."""
        blocks = {id(block): block for slot in self._slots.values() for block in slot.blocks}
        idle = sum(block.users == 0 for block in blocks.values())
        if idle != self.num_evictable:
            raise ConservationError(f"{idle} blocks are idle, and {self.num_evictable} are counted")
        for number, slot in self._slots.items():
            if any(number not in block.holders for block in slot.blocks[slot.shared :]):
                raise ConservationError(f"slot {number} holds a block that does not know it")
            if slot.source is not None and self._slots[slot.source].readers[number] != slot.shared:
                raise ConservationError(f"slot {number} and its source {slot.source} disagree")
        if any(self._index[block.digest] is not block for block in blocks.values() if block.digest):
            raise ConservationError("a block is not found by its hash")
        if any(id(block) not in blocks for block in self._index.values()):
            raise ConservationError("the index finds a block that no slot holds")

    def _compare(self, number: int, count: int, tokens: Tokens, limit: int) -> Match | None:
        slot, start = self._slots[number], count * self._per_block
        common = start
        if slot.tokens is not None:
            end = max(start, min(start + self._per_block, len(slot.tokens), limit))
            pairs = zip(tokens(start, end), slot.tokens[start:end], strict=True)
            common += sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if not common or len(slot.blocks) < count:
            return None
        in_place = self._can_go_on(slot, number, count, common)
        read = slot.blocks if in_place else slot.blocks[:count]
        num_revived = sum(block.users == 0 for block in read)
        return Match(number, count, common, in_place, len(read), num_revived)

    def _can_go_on(self, slot: Slot, number: int, count: int, common: int) -> bool:
        """Whether hardly anything of a closed slot would be lost, and nobody else reads that."""
        if slot.tokens is None or len(slot.tokens) - common >= max(1, self._per_block // 4):
            return False
        return slot.num_read(self._per_block) <= count and all(
            block.users == 0 and block.holders == {number} for block in slot.blocks[count:]
        )

    def _extend(self, slot: Slot, number: int, num_blocks: int) -> None:
        slot.blocks += [Block(number) for _ in range(num_blocks - len(slot.blocks))]

    def _announce(self, slot: Slot, chain: TokenChain, num_blocks: int) -> None:
        """Let a slot's blocks be found by their hashes, unless others with the same content are."""
        for block, digest in zip(
            slot.blocks[slot.num_known : num_blocks], chain.digests[slot.num_known : num_blocks], strict=True
        ):
            if self.is_enabled and digest not in self._index:
                block.digest = digest
                self._index[digest] = block
        slot.num_known = max(slot.num_known, num_blocks)

    def _forget_digest(self, block: Block) -> None:
        if block.digest is not None:
            del self._index[block.digest]
            block.digest = None

    def _forget_tail(self, number: int) -> None:
        slot = self._slots[number]
        if slot.tail is not None:
            ends = self._tails[slot.tail]
            ends.discard(number)
            if not ends:
                del self._tails[slot.tail]
            slot.tail = None

    def _cut(self, number: int, num_blocks: int) -> None:
        """Take a slot's blocks from `num_blocks` on out of it."""
        slot = self._slots[number]
        if len(slot.blocks) > num_blocks:
            self._forget_tail(number)
            if slot.tokens is not None:
                slot.tokens = slot.tokens[: num_blocks * self._per_block]
        while len(slot.blocks) > num_blocks:
            block = slot.blocks.pop()
            block.holders.discard(number)
            if not block.holders:
                self._forget_digest(block)
                self.num_evictable -= block.users == 0

    def _use(self, block: Block) -> None:
        self.num_evictable -= block.users == 0
        block.users += 1

    def _unuse(self, block: Block) -> None:
        block.users -= 1
        if not block.users:
            self.num_evictable += 1
            block.read_until = self.newest_step

    def _touch(self, number: int) -> None:
        self._clock += 1
        self._slots[number].last_used = self._clock


def _preference(match: Match) -> tuple[int, bool]:
    return match.num_tokens, match.is_in_place
