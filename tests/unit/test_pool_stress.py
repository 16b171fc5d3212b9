"""Random conversations on a memory pool, without an engine: every token's KV is its own, no chunk is lost.

What the scheduler does with a pool is done here at random, in a tight one: slots are opened on what is
there, grown, mapped ahead, closed early or late, and memory is given back in between, with two steps in
flight, a mapping thread that is slow at times, and a driver that refuses to map now and then.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch

from engine.config import Mode
from engine.memory.blocks import Opened, TokenChain
from engine.memory.kv_geometry import KvGeometry
from engine.memory.pool import MemoryPool
from engine.memory.virtual_tensor import VirtualTensor
from tests.failing_memory import FailingVirtualMemory
from tests.fakes import CHUNK_BYTES, SPECS

LONGEST = 96
NUM_SEQS = 6
GEOMETRY = KvGeometry.choose(4, 2, 8, 4, CHUNK_BYTES, layers_per_group=2)  # 2 groups, 16 tokens a chunk
T = GEOMETRY.tokens_per_chunk
NO_DRAFT = -1

Place = tuple[VirtualTensor, int]


@dataclass(eq=False)
class Conversation:
    """A sequence that holds a slot.

    Attributes:
        known: its tokens; `num_computed` of them have KV.
    """

    chain: TokenChain
    known: list[int]
    opened: Opened
    num_computed: int

    @cached_property
    def slot(self) -> int:
        return self.opened.slot

    def tokens(self, start: int, end: int) -> list[int]:
        return self.known[start:end]


class Conversations:
    """A pool, those who hold a slot of it, and what others have said before.

    Attributes:
        in_flight: steps, each with the places it reads and writes and the chunks that are there.
    """

    def __init__(self, seed: int, mode: Mode, total: int, num_slots: int) -> None:
        self.dice = random.Random(seed)
        self.num_slots = num_slots
        self.vm = FailingVirtualMemory(CHUNK_BYTES, total)  # which can be slow
        self.pool = MemoryPool(
            self.vm,
            total,
            mode,
            GEOMETRY,
            SPECS,
            NUM_SEQS,
            LONGEST,
            48,
            torch.float32,
            (),
            3 * NUM_SEQS,
            True,
        )
        self.open: list[Conversation] = []
        self.said = [self._fresh(length) for length in (5, 20, 40)]
        self.in_flight: list[tuple[int, list[tuple[Place, int]]]] = []
        self.step = self.num_reserved = self.num_short = self.num_cached = 0

    def run(self, operations: int) -> None:
        weights = {self.start: 5, self.compute: 10, self.finish: 12, self.end: 4, self.map_ahead: 4}
        for index in range(operations):
            self.dice.choices([*weights, self.trim, self.refuse], [*weights.values(), 0.3, 0.3])[0]()
            self.pool.check()
            if index % 50 == 0:
                for one in self.open:
                    self.verify(one)

    def start(self) -> None:
        """Open a slot for a prompt that goes on from something said, or parts from it on the way."""
        base = self.dice.choice(self.said)
        kept = self.dice.choice([len(base), max(1, len(base) - 2), self.dice.randint(0, len(base))])
        known = [*base[:kept], *self._fresh(self.dice.choice([1, 12]))][: LONGEST - 8]
        if len(self.open) == NUM_SEQS:
            return
        chain = TokenChain(self.dice.choice(["", "", "salted"]), T)
        chain.extend(lambda start, end: known[start:end], len(known))
        match = self.pool.match(chain, lambda start, end: known[start:end], len(known), NO_DRAFT)
        if self.pool.prefixes.must_wait(chain, match, len(known), NO_DRAFT):
            return
        need, room = self.pool.chunks_to_open(match, len(known)), self._room()
        if need > self.pool.room_for_kv(1, 1):
            return
        opened = self.pool.open_slot(match, chain, len(known))
        if opened is None:
            assert self.num_slots < 2 * NUM_SEQS, "all others are in use, or read through"
            return
        if match is None or opened.num_tokens >= match.num_blocks * T:  # else what is there could not be had
            lost = room - self._room() + self._missing(opened.slot, len(known))
            # Until it is copied, the block whose beginning is copied is kept too.
            assert lost - need in ((0, GEOMETRY.num_groups) if opened.copy else (0,))
        self.num_cached += opened.num_tokens
        self.open.append(Conversation(chain, known, opened, opened.num_tokens))

    def compute(self) -> None:
        """Some of those that hold a slot get their next tokens computed, if memory allows."""
        pieces = [(one, self._next_count(one)) for one in self._some() if one.num_computed < LONGEST]
        growth = [(one.slot, one.num_computed + count) for one, count in pieces]
        size = sum(count for _, count in pieces), len(pieces)
        if not pieces or size[0] > 48:
            return
        held, num_refused = self.pool.kv.num_missing(growth), self.vm.refusals.num_refused.total()
        if not self.pool.reserve(growth, *size):
            assert self.pool.kv.num_missing(growth) == held, "nobody has gained or lost anything"
            was_refused = self.vm.refusals.num_refused.total() > num_refused
            assert was_refused or held > self.pool.room_for_kv(*size) or self.in_flight, "no shortage"
            self.num_short += 1
            return
        self.num_reserved += 1
        self.step += 1
        self.pool.launched(self.step)
        reads = [place for one, count in pieces for place in self._places(one, one.num_computed + count)]
        arena = self.pool.arena
        reads += [(arena.tensor, row) for row in range(arena.chunks_for(*size))]
        self.in_flight.append((self.step, [(place, _chunk_at(place)) for place in reads]))
        for buffer in self.pool.arena.buffers(*size).values():
            buffer.fill_(float("nan"))
        for one, count in pieces:
            self._compute(one, count)
        for one, _ in pieces:
            self.verify(one)

    def finish(self) -> None:
        """The oldest step in flight ends; a third is not launched before."""
        if self.in_flight:
            step, reads = self.in_flight.pop(0)
            for place, chunk in reads:
                assert _chunk_at(place) == chunk, f"step {step} still reads this"
            self.pool.finished(step)

    def end(self) -> None:
        if self.open:
            one = self.open.pop(self.dice.randrange(len(self.open)))
            kept = one.num_computed
            if one.opened.copy is not None:  # what was to be copied is not there
                kept -= kept % T
            if self.dice.random() < 0.1:
                kept = min(kept, self.pool.prefixes.distrust(one.slot))
            self.pool.close_slot(one.slot, one.chain, tuple(one.known[:kept]))
            self.said = [*self.said[-9:], one.known[:kept] or self._fresh(9)]

    def map_ahead(self) -> None:
        if self.dice.random() < 0.5:
            self.vm.hold()
        else:
            self.vm.proceed()
        growth = [(one.slot, min(LONGEST, one.num_computed + 20)) for one in self.open]
        self.pool.ahead.grow(growth, self.dice.choice([16, LONGEST]))

    def refuse(self) -> None:
        self.vm.refuse(self.dice.choice(["map", "access"]), after=self.dice.randrange(4))

    def trim(self) -> None:
        drops_cache, created = self.dice.random() < 0.5, self.pool.created_bytes
        freed = self.pool.trim(drops_cache)
        assert created - self.pool.created_bytes <= freed, "what was on its way may have been made meanwhile"
        assert (
            not drops_cache
            or self.pool.snapshot().free == self.pool.chunks.total - self.pool.chunks.num_created
        )

    def verify(self, one: Conversation) -> None:
        """Every key and value of a sequence, read as a kernel does."""
        if not one.num_computed or one.opened.copy is not None:
            return
        kv, shared = self.pool.kv, one.opened.shared_tokens // T
        rows = torch.arange(GEOMETRY.rows_for(one.num_computed)) + kv.first_row(one.slot)
        rows[:shared] += kv.first_row(one.opened.shared_slot) - kv.first_row(one.slot)
        wanted = torch.tensor(one.known[: one.num_computed], dtype=torch.float32)[:, None, None]
        for layer in (0, 1, 3):
            for side, sign in ((0, 1), (1, -1)):
                found = kv.layer_views[layer][rows, side].flatten(0, 1)[: one.num_computed]
                assert bool((found == sign * (wanted + layer)).all()), f"layer {layer} of slot {one.slot}"

    def _compute(self, one: Conversation, count: int) -> None:
        kv, prefixes = self.pool.kv, self.pool.prefixes
        if (copy := one.opened.copy) is not None:
            kv.copy_rows(copy.source_row, copy.target_row)
            prefixes.copied(one.slot)
            one.opened = Opened(one.slot, 0, one.opened.shared_slot, one.opened.shared_tokens)
        end = one.num_computed + count
        positions = torch.arange(one.num_computed, end)
        rows, offsets = kv.first_row(one.slot) + positions // T, positions % T
        written = torch.tensor(one.known[one.num_computed : end], dtype=torch.float32)[:, None, None]
        for layer, view in enumerate(kv.layer_views):
            view[rows, 0, offsets] = written + layer
            view[rows, 1, offsets] = -written - layer
        one.num_computed = end
        prefixes.computed(one.slot, end)
        if end == len(one.known):
            one.known.append(self.dice.randrange(1, 999))
            one.chain.extend(one.tokens, end)
            prefixes.known(one.slot, one.chain)

    def _room(self) -> int:
        """For KV, once the steps in flight have ended."""
        return self.pool.room_for_kv(1, 1) + self.pool.chunks.num_retiring

    def _places(self, one: Conversation, num_tokens: int) -> list[Place]:
        first, there = (self.pool.kv.first_row(slot) for slot in (one.slot, one.opened.shared_slot))
        shared = one.opened.shared_tokens // T
        rows = [(there if at < shared else first) + at for at in range(GEOMETRY.rows_for(num_tokens))]
        if one.opened.copy is not None:
            rows.append(one.opened.copy.source_row)
        return [(tensor, row) for tensor in self.pool.kv.tensors for row in rows]

    def _missing(self, slot: int, num_tokens: int) -> int:
        return self.pool.kv.num_missing([(slot, num_tokens)])

    def _next_count(self, one: Conversation) -> int:
        return min(len(one.known) - one.num_computed, self.dice.choice([1, 5, 16, 40]))

    def _some(self) -> list[Conversation]:
        if len(self.in_flight) == 2:
            self.finish()
        return [one for one in self.open if self.dice.random() < 0.7]

    def _fresh(self, count: int) -> list[int]:
        return [self.dice.randrange(1, 999) for _ in range(count)]


def _chunk_at(place: Place) -> int:
    tensor, row = place
    return tensor._mapped[row]  # the row may have been dropped: mapped, and not backed


@pytest.mark.parametrize(
    ("mode", "total", "num_slots"), [("elastic", 44, 18), ("elastic", 70, 8), ("virtual", 52, 12)]
)
def test_random_conversations(mode: Mode, total: int, num_slots: int) -> None:
    talk = Conversations(total, mode, total, num_slots)
    talk.pool.keep_backed(4, 4)
    talk.run(6000)
    assert min(talk.num_reserved, talk.num_cached) > 500
    assert talk.num_short > 0
    for one in talk.open:
        talk.pool.close_slot(one.slot, one.chain, ())
    while talk.in_flight:
        talk.finish()
    talk.vm.allow()
    talk.pool.trim(drops_cache=True)
    talk.pool.check()
    now = talk.pool.snapshot()
    assert (now.kv, now.cached, now.retiring, now.kv_tokens) == (0, 0, 0, 0)
    assert now.created == now.guard + now.activation == now.total - now.free
    talk.vm.close()


def test_the_arena_keeps_what_graphs_replay_in() -> None:
    """Room for KV ends where the lowest chunks of the arena begin, however small the step."""
    talk = Conversations(1, "elastic", 44, 8)
    assert talk.pool.reserve([], 40, 6)
    talk.pool.keep_backed(20, 4)
    for _ in range(NUM_SEQS):
        opened = talk.pool.open_slot(None, TokenChain("", T), LONGEST)
        assert opened is not None
        held = 0
        while (
            talk.pool.kv.num_missing([(opened.slot, held + 1)]) <= talk.pool.room_for_kv(1, 1)
            and held < LONGEST
        ):
            held += 1
            assert talk.pool.reserve([(opened.slot, held)], 1, 1), "the room was there"
    assert held < LONGEST, "the pool is not full"
    assert talk.pool.arena.is_backed(20, 4)
    talk.pool.check()
    talk.vm.close()
