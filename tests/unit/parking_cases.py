"""Sequences in a pool with a balloon, without an engine: each is moved by hand, and every value read back."""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Sequence

import torch

from engine.memory.backing import Backing
from engine.memory.balloon import Balloon
from engine.memory.blocks import Opened, TokenChain
from engine.memory.copies import Direction
from engine.memory.host_vmm import HostVirtualMemory
from engine.memory.kv_geometry import KvGeometry
from engine.memory.parking import Parking
from engine.memory.pool import MemoryPool
from engine.memory.slabs import PlainSlabs, SlabMaker
from tests.fakes import CHUNK_BYTES, GEOMETRY, SPECS, Bench, HeldCopies, HeldTicket
from tests.unit.engine_cases import tokens

T = GEOMETRY.tokens_per_chunk
GROUPS = GEOMETRY.num_groups
LONGEST = 8 * T
OUT, IN = Direction.OUT, Direction.IN
STAGES = ("leaving", "parked", "coming", "slotless")
_PIECE = T // 2  # so that the arena needs little beside what is parked
_NO_DRAFT = -1
_PLENTY = 1 << 40


class Guest:
    """A sequence in a slot, or parked. What it has been told comes back by its tokens and their positions."""

    def __init__(self, chain: TokenChain, known: Sequence[int], opened: Opened) -> None:
        self.chain = chain
        self.known = known
        self.opened = opened
        self.slot: int | None = opened.slot
        self.num_computed = opened.num_tokens
        self.backing = Backing()

    @property
    def held_slot(self) -> int:
        assert self.slot is not None
        return self.slot

    def tokens(self, start: int, end: int) -> Sequence[int]:
        return self.known[start:end]


class Yard:
    """A pool, a balloon that is there from the start, copies that end when they are told to, and guests.

    Args:
        total: chunks of the pool.
        host: chunks of the balloon.
    """

    def __init__(
        self,
        total: int = 120,
        host: int = 120,
        geometry: KvGeometry = GEOMETRY,
        num_slots: int = 16,
        vm: HostVirtualMemory | None = None,
        maker: SlabMaker | None = None,
    ) -> None:
        self.geometry = geometry
        self.per_block = geometry.tokens_per_chunk
        self.pool = MemoryPool(
            vm or HostVirtualMemory(CHUNK_BYTES, total),
            total,
            "elastic",
            geometry,
            SPECS,
            num_slots,
            8 * self.per_block,
            64,
            torch.float32,
            num_slots=num_slots,
            caches_prefixes=True,
        )
        self.copies = HeldCopies()
        watch(self.pool, self.copies)
        self.balloon = filled(Balloon(maker or PlainSlabs(), CHUNK_BYTES, host, host, lambda: _PLENTY))
        self.pool.add_balloon(self.balloon, self.copies)
        assert self.pool.parking is not None
        self.parking: Parking = self.pool.parking
        self._names = itertools.count()
        self._step = 0

    @property
    def num_held(self) -> int:
        """Host chunks that somebody needs, and that are not only kept to be found."""
        return self.balloon.num_used - self.parking.host.num_cached

    def guest(self, num_tokens: int, prefix: Sequence[int] = (), longest: int = LONGEST) -> Guest:
        """A new sequence, computed up to so many tokens; it begins as told."""
        guest = self.try_guest(num_tokens, prefix, longest)
        assert guest is not None
        return guest

    def try_guest(self, num_tokens: int, prefix: Sequence[int] = (), longest: int = LONGEST) -> Guest | None:
        """The same, or None if there is no slot, or no memory for all of it."""
        known = (*prefix, *tokens(f"guest{next(self._names)}", longest - len(prefix)))
        chain = TokenChain("", self.per_block)
        match = self.pool.match(chain, lambda start, end: known[start:end], num_tokens, _NO_DRAFT)
        opened = self.pool.open_slot(match, chain, num_tokens)
        if opened is None:
            return None
        guest = Guest(chain, known, opened)
        if self.compute(guest, num_tokens):
            return guest
        self.end(guest)
        return None

    def compute(self, guest: Guest, until: int) -> bool:
        """Let a sequence go on to so many tokens; False if memory is short."""
        while guest.num_computed < until:
            if not self.launch(guest, min(until, guest.num_computed + _PIECE)):
                return False
            self.finish()
        return True

    def launch(self, guest: Guest, until: int) -> bool:
        """The same in one step, which is then in flight."""
        slot, start = guest.held_slot, guest.num_computed
        if not self.pool.reserve([(slot, until)], until - start, 1):
            return False
        self._step += 1
        self.pool.launched(self._step)
        if guest.opened.copy is not None and start == guest.opened.num_tokens:
            self.pool.kv.copy_rows(guest.opened.copy.source_row, guest.opened.copy.target_row)
            self.pool.prefixes.copied(slot)
        self._write(slot, guest, start, until)
        guest.num_computed = until
        self.pool.prefixes.computed(slot, until)
        self.pool.hash(guest.chain, guest.tokens, until)
        self.pool.prefixes.known(slot, guest.chain)
        return True

    def finish(self) -> None:
        """Every step in flight ends."""
        self.pool.finished(self._step)

    def end(self, guest: Guest) -> None:
        """A sequence ends, parked or not."""
        slot, num_tokens = self.parking.discard(guest.backing, guest.chain, guest.num_computed)
        if guest.slot is not None:
            slot, num_tokens, guest.slot = guest.slot, guest.num_computed, None
        if slot is not None:
            self.pool.close_slot(slot, guest.chain, guest.tokens(0, num_tokens))
        self.pool.check()

    def park(self, guest: Guest, num_chunks: int = 1000) -> bool:
        """Begin to move a sequence off the device, whole unless told otherwise."""
        has_begun = self.parking.park(guest.backing, guest.held_slot, guest.num_computed, num_chunks)
        if has_begun:
            guest.slot = None
        self.pool.check()
        return has_begun

    def settle(self) -> None:
        """What has been submitted ends, and is taken in."""
        self.copies.end()
        self.parking.settle()
        self.pool.check()

    def leave(self, guest: Guest, num_chunks: int = 1000) -> None:
        """The whole way off the device."""
        assert self.park(guest, num_chunks)
        self.settle()

    def arrive(self, guest: Guest) -> None:
        """A sequence that was brought back goes on."""
        self.copies.end()
        assert self.parking.is_back(guest.backing)
        assert not guest.backing.is_lost
        guest.slot = self.parking.returned(guest.backing, guest.chain, guest.num_computed)
        self.pool.check()

    def back(self, guest: Guest) -> None:
        """The whole way back, as it was."""
        assert self.parking.bring_back(guest.backing, 0)
        self.pool.check()
        self.arrive(guest)
        self.verify(guest)

    def reach(self, guest: Guest, stage: str) -> None:
        """Bring a sequence into one of `STAGES`."""
        assert self.park(guest, 1000 if stage == "slotless" else 4)
        if stage != "leaving":
            self.settle()
        if stage == "coming":
            assert self.parking.bring_back(guest.backing, 0)
        assert guest.backing.is_leaving == (stage == "leaving")
        assert (guest.backing.slot is None) == (stage == "slotless")
        assert (guest.backing.coming is not None) == (stage == "coming")

    def soil(self) -> None:
        """Let somebody else have what is free, and leave it dirty."""
        visitors = []
        while (num_rows := self.pool.chunks.num_free // self.geometry.num_groups - 2) > 0:
            visitors.append(self.guest(min(num_rows, 8) * self.per_block))
        for visitor in visitors:
            self.pool.close_slot(visitor.held_slot, visitor.chain, ())
        assert visitors

    def rows(self, guest: Guest) -> list[int]:
        """The rows that a sequence reads, its source's first."""
        kv, shared = self.pool.kv, guest.opened.shared_tokens // self.per_block
        there, first = kv.first_row(guest.opened.shared_slot), kv.first_row(guest.held_slot)
        count = self.geometry.rows_for(guest.num_computed)
        rows = [(there if at < shared else first) + at for at in range(count)]
        # To read what is not mapped would end the process.
        assert all(row in tensor._backed for tensor in kv.tensors for row in rows), "not on the device"
        return rows

    def content(self, guest: Guest) -> torch.Tensor:
        """Every byte of a sequence's rows: (layer groups, rows, bytes)."""
        ranges = [tensor.view(torch.uint8).view(-1, CHUNK_BYTES) for tensor in self.pool.kv.tensors]
        return torch.stack([rows[self.rows(guest)] for rows in ranges])

    def verify(self, guest: Guest) -> None:
        """Every key and value of a sequence is what was written for it."""
        rows, count = self.rows(guest), guest.num_computed
        for layer, view in enumerate(self.pool.kv.layer_views):
            found = view[rows].transpose(1, 2).flatten(0, 1)[:count]
            assert torch.equal(found, self._values(guest, 0, count, layer).expand_as(found)), f"layer {layer}"

    def is_on_device(self, backing: Backing, slot: int, group: int) -> bool:
        """Whether a layer group of a parked sequence is there, and nobody else's."""
        kv = self.pool.kv
        rows = range(kv.first_row(slot) + backing.first, kv.first_row(slot) + backing.end)
        return all(row in kv.tensors[group]._backed for row in rows)

    def _write(self, slot: int, guest: Guest, start: int, end: int) -> None:
        positions = torch.arange(start, end)
        rows = self.pool.kv.first_row(slot) + positions // self.per_block
        for layer, view in enumerate(self.pool.kv.layer_views):
            view[rows, :, positions % self.per_block] = self._values(guest, start, end, layer)

    @staticmethod
    def _values(guest: Guest, start: int, end: int, layer: int) -> torch.Tensor:
        """(tokens, K and V, heads, dim), exact in float32."""
        known = torch.tensor(guest.known[start:end], dtype=torch.float32)
        values = (known * LONGEST + torch.arange(start, end)) * 8 + layer
        return torch.stack([values, -values], dim=1)[:, :, None, None]


def num_parkings(bench: Bench) -> int:
    """How often a sequence of an engine was parked."""
    return bench.engine.snapshot.num_parkings


def watch(pool: MemoryPool, copies: HeldCopies) -> None:
    """Look at each copy when it begins and when it ends, for as long as there is the pool."""
    seen = weakref.ref(pool)  # whoever drops the pool wants it gone, and its finalizer knows the copies

    def check(ticket: HeldTicket) -> None:
        still_there = seen()
        if still_there is not None:
            check_ticket(still_there, ticket)

    copies.check = check


def check_ticket(pool: MemoryPool, ticket: HeldTicket) -> None:
    """What is copied is in use, on the device and in the balloon: it is neither unmapped nor given away."""
    assert pool.parking is not None
    balloon = pool.parking.balloon
    here, there = ticket.sources, ticket.targets
    if ticket.direction is IN:
        here, there = there, here
    taken = {balloon.address_of(chunk) for chunk in balloon._used}
    assert taken.issuperset(there), "a host chunk is not taken"
    backed = {tensor.address_of(row) for tensor in pool.kv.tensors for row in tensor._backed}
    assert backed.issuperset(here), "a chunk of the device is not owned"


def filled(balloon: Balloon) -> Balloon:
    """A balloon whose first slab is there."""
    give_up = time.monotonic() + 20
    while not balloon.num_physical:
        assert time.monotonic() < give_up
        balloon.grow_ahead()
        time.sleep(0.0005)
    return balloon
