"""The one door to memory for the scheduler: KV slots and activations out of one pool of chunks.

A step reserves all it needs, KV growth and activations, in one all-or-nothing transaction before it
starts (eLLM section 4; without that, two half-served steps can block each other for good). Shortage is
a value. Sources, in this order: free chunks, the arena's idle tail, blocks that no sequence reads, the
least useful first, layer groups of parked sequences; what is still missing, a sequence has to give.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence

import torch

from engine.config import Mode
from engine.errors import ConfigError, ConservationError, DriverError
from engine.memory.ahead import MappingAhead
from engine.memory.arena import SMALLEST_PIECE, ActivationArena, BufferSpec
from engine.memory.balloon import Balloon
from engine.memory.blocks import Match, Opened, TokenChain, Tokens
from engine.memory.chunks import ChunkPool
from engine.memory.copies import Copies, Direction
from engine.memory.host_prefixes import HostPrefixes
from engine.memory.host_rows import HostRows
from engine.memory.kv_cache import KvCache
from engine.memory.kv_geometry import KvGeometry
from engine.memory.kv_slots import KvSlots
from engine.memory.kv_stream import KvTransport
from engine.memory.layer_wise import LayerWise
from engine.memory.limit import PoolLimit
from engine.memory.parking import Parking
from engine.memory.passages import Passages
from engine.memory.virtual_tensor import VirtualTensor
from engine.memory.vmm import VirtualMemory
from engine.messages import MemorySnapshot

logger = logging.getLogger(__name__)

_USUAL_STEPS = 64  # a sequence that comes back leaves the arena what the largest of so many steps needed
_ONE_TOKEN = 1, 1


class MemoryPool:
    """All memory of one engine that is not weights.

    Args:
        vm: the driver.
        total: chunks of the pool.
        mode: `elastic`, `virtual` or `static`.
        geometry: how KV fills chunks.
        specs: the buffers of a forward pass.
        num_seqs: sequences that may run at once.
        max_model_len: tokens of the longest sequence.
        max_step_tokens: tokens of the largest step.
        dtype: of keys and values.
        padded_sizes: tokens and rows that a step may be filled up to (CUDA graphs have fixed sizes).
        num_slots: sequences that may hold KV at once, running or not.
        caches_prefixes: whether KV outlives its sequence.
    """

    def __init__(  # noqa: PLR0913 - every argument is a fact of another owner
        self,
        vm: VirtualMemory,
        total: int,
        mode: Mode,
        geometry: KvGeometry,
        specs: Sequence[BufferSpec],
        num_seqs: int,
        max_model_len: int,
        max_step_tokens: int,
        dtype: torch.dtype,
        padded_sizes: Sequence[int] = (),
        num_slots: int | None = None,
        caches_prefixes: bool = False,
    ) -> None:
        self._vm, self._mode = vm, mode
        self._step_chunks = 0
        self._steps: deque[tuple[int, int]] = deque([_ONE_TOKEN], maxlen=_USUAL_STEPS)
        self.chunks = ChunkPool(vm, total)
        self.limit = PoolLimit(self.chunks, self._vacate, mode == "elastic")
        if mode != "elastic":
            self.chunks.create_all()
        self.arena = ActivationArena(self.chunks, specs, max_step_tokens, num_seqs, padded_sizes)
        guard = self._take_or_raise(1, "guard")[0]
        self._floor = self.arena.max_chunks if mode != "elastic" else 1
        self.arena.tensor.map(range(self._floor), self._take_or_raise(self._floor, "activation"))
        if mode == "static":
            num_slots = self._slots_that_fit(geometry, num_seqs, max_model_len)
        self.kv = KvCache(self.chunks, geometry, num_slots or num_seqs, max_model_len, dtype, guard)
        self.kv.layer_views[0][0].zero_()
        if mode == "static":
            self._back_every_slot(max_model_len)
        self._slots = KvSlots(self.kv, self.chunks, caches_prefixes, is_static=mode == "static")
        self.prefixes = self._slots.prefixes
        self.ahead = MappingAhead(self.chunks, self.kv, self._slots, self._shrink_idle, mode != "static")
        self.parking: Parking | None = None
        self.layer_wise: LayerWise | None = None
        self.host_prefixes: HostPrefixes | None = None
        self.passages: Passages | None = None

    def add_balloon(self, balloon: Balloon, copies: Copies, transport: KvTransport | None = None) -> None:
        """From now on sequences can be parked in host memory, and what they leave is kept there.

        Args:
            transport: by which parked ones go to other engines, and come from there.
        """
        host, back = HostRows(balloon, self.kv.geometry.num_groups), self._back_returning
        parts = self.kv, self._slots, self.chunks
        self.parking = parking = Parking(*parts, host, copies, self._room_to_return, back)
        self.layer_wise = LayerWise(*parts, parking)
        self.host_prefixes = HostPrefixes(*parts, parking, back)
        if transport is not None:
            self.passages = Passages(parking, transport, self.kv.geometry.tokens_per_chunk)

    @property
    def num_free_slots(self) -> int:
        """Slots that `open_slot` could give out."""
        return self._slots.num_free

    @property
    def num_evictable(self) -> int:
        """Chunks with KV that no live sequence reads."""
        return self._slots.num_evictable

    @property
    def created_bytes(self) -> int:
        """Physical memory behind the pool's chunks."""
        return self.chunks.num_created * self._vm.chunk_bytes

    def resize(self, num_bytes: int) -> None:
        """Another budget; no smaller than what is there already."""
        self.chunks.resize(num_bytes // self._vm.chunk_bytes)
        if self._mode != "elastic":
            self.chunks.create_all()

    def chunks_for(self, num_tokens: int) -> int:
        """Chunks that a sequence of that length needs to be computed, alone, to its end."""
        kv, step = self.kv.geometry.chunks_for(num_tokens), self.arena.chunks_for(SMALLEST_PIECE, 1)
        return kv + max(self._floor, step) + 1  # the guard

    def room_for_kv(self, num_tokens: int, num_rows: int) -> int:
        """Chunks KV could gain beside a step of that size; negative if the step alone is too large."""
        spare = self.arena.num_backed - self.arena.chunks_for(num_tokens, num_rows)
        if self._mode != "elastic":
            spare = min(spare, 0)
        else:
            spare = min(spare, max(0, self.arena.num_backed - self._floor))
        idle = self.parking.num_idle if self.parking else 0
        return self.chunks.num_free + self._slots.num_evictable + idle + spare

    def fits_step(self, num_tokens: int, num_rows: int) -> bool:
        """Whether a step of that size could run now if KV stayed as it is."""
        is_within = self.arena.chunks_for(num_tokens, num_rows) <= self.arena.max_chunks
        return is_within and self.room_for_kv(num_tokens, num_rows) >= 0

    def keep_backed(self, num_tokens: int, num_rows: int) -> None:
        """Never take from the arena what a step of that size needs: CUDA graphs replay there."""
        self._floor = max(self._floor, self.arena.chunks_for(num_tokens, num_rows))

    def chunks_to_grow(self, slot: int, num_tokens: int) -> int:
        """Chunks the slot lacks to hold `num_tokens` tokens."""
        return self.kv.num_missing(((slot, num_tokens),))

    def hash(self, chain: TokenChain, tokens: Tokens, num_tokens: int) -> None:
        """Bring a sequence's hashes up to its first `num_tokens` tokens, if anybody looks for them."""
        if self.prefixes.is_enabled:
            chain.extend(tokens, num_tokens)

    def match(self, chain: TokenChain, tokens: Tokens, num_tokens: int, draft: int) -> Match | None:
        """What of a sequence is there already, or will be when the draft of that number has run."""
        self.hash(chain, tokens, num_tokens)
        return self.prefixes.match(chain, tokens, num_tokens, draft)

    def chunks_to_open(self, match: Match | None, num_tokens: int) -> int:
        """Chunks that room for KV loses if a sequence of that length is opened on a match, in the end."""
        return self._slots.chunks_to_open(match, num_tokens)

    def chunks_wanted(self, but_by: str) -> int:
        """Evictable chunks that waiting requests will read, other than this one."""
        return self.prefixes.num_wanted(but_by) * self.kv.geometry.num_groups

    def open_slot(self, match: Match | None, chain: TokenChain, num_tokens: int) -> Opened | None:
        """A slot for a sequence of so many tokens, on what there is of it; None if there is no slot."""
        opened = self._slots.open(match, chain, num_tokens)
        if opened is not None:
            self._slots.num_tokens[opened.slot] = opened.num_tokens
        return opened

    def close_slot(self, slot: int, chain: TokenChain, tokens: Sequence[int]) -> None:
        """Give a slot back, with KV of `tokens` in it. It is kept until somebody needs the memory."""
        self._slots.close(slot, chain, tokens)

    def reserve(
        self, growth: Sequence[tuple[int, int]], num_tokens: int, num_rows: int, staged_tokens: int = 0
    ) -> bool:
        """Back everything a step needs, or nothing.

        Args:
            growth: (slot, tokens it must hold after the step).
            num_tokens, num_rows: size of the step.
            staged_tokens: of a prompt in it that is computed layer-wise.

        Returns:
            False if memory is short now or the driver refused: no sequence has gained or lost anything.
        """
        arena_rows = self.arena.missing_rows(self.arena.chunks_for(num_tokens, num_rows))
        wanted: list[tuple[VirtualTensor, int]] = [(self.arena.tensor, row) for row in arena_rows]
        for slot, tokens in growth:
            wanted += self.kv.missing(slot, tokens)
        num_staged = self.layer_wise.num_missing(staged_tokens) if self.layer_wise and staged_tokens else 0
        if len(wanted) - len(arena_rows) + num_staged > self.room_for_kv(num_tokens, num_rows):
            return False
        if self.layer_wise and num_staged:
            self._make_room(num_staged, self.arena.chunks_for(num_tokens, num_rows))
            if not self.layer_wise.grow(staged_tokens):
                return False
        if wanted and not self._back(wanted, self.arena.chunks_for(num_tokens, num_rows)):
            return False
        for slot, tokens in growth:
            self.kv.grown(slot, tokens)
            self._slots.num_tokens[slot] = tokens
        self._steps.append((num_tokens, num_rows))
        self._step_chunks = self.arena.chunks_for(num_tokens, num_rows)
        return True

    def launched(self, step: int) -> None:
        """A reserved step is about to run: nothing it may read is unmapped before it finishes."""
        self.chunks.launched(step)
        self.arena.used(step, self._step_chunks)
        self.prefixes.newest_step = step

    def finished(self, step: int) -> None:
        """The step has finished on the device."""
        self.chunks.finished(step)

    def trim(self, drops_cache: bool = False) -> int:
        """Give every free chunk back to the system, the arena's idle tail included; bytes released.

        Args:
            drops_cache: what no sequence reads is given up first.
        """
        if drops_cache:
            self._slots.evict(self._slots.num_evictable)
            if self.host_prefixes is not None:
                self.host_prefixes.forget_idle()
        if self._mode == "elastic":
            self.arena.shrink(self._floor)
        if self.layer_wise is not None:
            self.layer_wise.release()
        self.chunks.settle()
        return self.chunks.trim() * self._vm.chunk_bytes

    def snapshot(self) -> MemorySnapshot:
        """Chunks by state, now."""
        chunks, parking = self.chunks, self.parking
        return MemorySnapshot(
            chunk_bytes=self._vm.chunk_bytes,
            total=chunks.total,
            free=chunks.num_unowned,
            kv=chunks.num_owned("kv") - self._slots.num_evictable,
            cached=self._slots.num_evictable,
            activation=chunks.num_owned("activation"),
            guard=chunks.num_owned("guard"),
            retiring=chunks.num_retiring,
            warm=chunks.num_warm,
            balloon=parking.balloon.num_used if parking else 0,
            balloon_cached=parking.host.num_cached if parking else 0,
            balloon_logical=parking.balloon.num_logical if parking else 0,
            balloon_physical=parking.balloon.num_held if parking else 0,
            balloon_limit=parking.balloon.num_limit if parking else 0,
            balloon_slab=parking.balloon.slab_chunks if parking else 0,
            copied_out_bytes=parking.copies.bytes_moved(Direction.OUT) if parking else 0,
            copied_in_bytes=parking.copies.bytes_moved(Direction.IN) if parking else 0,
            created=chunks.num_created,
            limit=chunks.budget.configured if chunks.budget.limit is None else chunks.budget.limit,
            configured=chunks.budget.configured,
            kv_tokens=sum(self._slots.num_tokens),
            driver_calls=self._vm.num_calls,
            driver_calls_beside=self._vm.num_calls_beside,
        )

    def check(self) -> None:
        """Raise ConservationError if a chunk is lost or counted twice, or the counts disagree."""
        self.chunks.check()
        self.prefixes.check()
        if self.parking is not None and self.host_prefixes is not None:
            self.parking.check()
            users = self.parking.users() + self.host_prefixes.users()
            self.parking.host.check(users + self.passages.users() if self.passages is not None else users)
        now = self.snapshot()
        if now.free + now.kv + now.cached + now.activation + now.guard + now.retiring != now.total:
            raise ConservationError(f"free + owned + retiring != total: {now}")

    def _back(self, wanted: Sequence[tuple[VirtualTensor, int]], num_used: int) -> bool:
        """Back all of that or nothing. The arena keeps the `num_used` lowest chunks it has."""
        if any(tensor.is_awaited(row) for tensor, row in wanted):
            self.chunks.receive(wait=True)
        adopted = [(tensor, row) for tensor, row in wanted if tensor.can_adopt(row)]
        empty = [(tensor, row) for tensor, row in wanted if tensor.is_empty(row)]
        if len(adopted) + len(empty) < len(wanted):
            return False  # a shared chunk is still being read where the new one has to go
        for tensor, row in adopted:
            tensor.adopt(row)
        self._make_room(len(empty), num_used)
        if self._map(empty):
            return True
        for tensor, row in adopted:
            tensor.drop([row])
        self.chunks.settle()
        return False

    @property
    def _usual_step(self) -> tuple[int, int]:
        """Tokens and rows of the largest of the last steps."""
        return max(self._steps)

    def _room_to_return(self, is_alone: bool) -> int:
        """Chunks that a parked sequence may take: what prompts compute in is left to them."""
        return self.room_for_kv(*(_ONE_TOKEN if is_alone else self._usual_step))

    def _back_returning(
        self, wanted: Sequence[tuple[VirtualTensor, int]], is_alone: bool, step_s: float
    ) -> bool:
        num_used = self.arena.chunks_for(*(_ONE_TOKEN if is_alone else self._usual_step))
        is_ready = self.ahead.is_ready(wanted, step_s, lambda count: self._make_room(count, num_used))
        return is_ready and self._back(wanted, num_used)

    def _make_room(self, num_chunks: int, num_used: int) -> None:
        """Let so many chunks become free, from the arena's idle tail first."""
        short = num_chunks - self.chunks.num_spare
        short -= self._shrink_arena(short, num_used)
        self._slots.evict(short)
        if self.parking is not None:
            self.parking.evict(num_chunks - self.chunks.num_free)

    def _vacate(self) -> None:
        """Let go of what no sequence needs, as far as more is held than may be."""
        self._make_room(0, self._step_chunks)
        if self.chunks.num_free < 0 and self.layer_wise is not None:
            self.layer_wise.release()

    def _shrink_idle(self, num_chunks: int) -> int:
        return self._shrink_arena(num_chunks, self._step_chunks)

    def _shrink_arena(self, num_chunks: int, num_used: int) -> int:
        """Take up to so many chunks from the arena's tail behind the `num_used` lowest; how many it were."""
        spare = self.arena.num_backed - max(self._floor, num_used)
        count = max(0, min(num_chunks, spare)) if self._mode == "elastic" else 0
        if count:
            self.arena.shrink(self.arena.num_backed - count)
            self.chunks.settle()
        return count

    def _map(self, places: Sequence[tuple[VirtualTensor, int]]) -> bool:
        by_owner: dict[str, list[tuple[VirtualTensor, int]]] = {}
        for tensor, row in places:
            by_owner.setdefault(tensor.owner, []).append((tensor, row))
        taken: list[int] = []
        ordered = [place for group in by_owner.values() for place in group]
        for owner, group in by_owner.items():
            chunks = self.chunks.take(len(group), owner)
            if chunks is None:
                self.chunks.put_back(taken)
                return False
            taken += chunks
        try:
            self.chunks.map(ordered, taken)
        except DriverError as error:
            logger.warning("the step has to wait for memory: %s", error)
            self.chunks.put_back(taken)
            return False
        for tensor, row in ordered:
            tensor.back(row)
        return True

    def _take_or_raise(self, count: int, owner: str) -> list[int]:
        chunks = self.chunks.take(count, owner)
        if chunks is None:
            raise ConservationError(f"the pool of {self.chunks.total} chunks is too small to start")
        return chunks

    def _slots_that_fit(self, geometry: KvGeometry, num_seqs: int, max_model_len: int) -> int:
        fits = self.chunks.num_free // geometry.chunks_for(max_model_len)
        if not fits:
            raise ConfigError(
                f"memory.mode static backs every sequence for max_model_len ({max_model_len} tokens, "
                f"{geometry.chunks_for(max_model_len)} chunks), and {self.chunks.num_free} chunks are left: "
                "lower max_model_len or max_num_batched_tokens, or choose another mode"
            )
        return min(num_seqs, fits)

    def _back_every_slot(self, max_model_len: int) -> None:
        for slot in range(self.kv.num_slots):
            if not self._map(self.kv.missing(slot, max_model_len)):
                raise ConfigError(
                    "the device refused to map a slot of memory.mode static: lower max_num_seqs"
                )
            self.kv.grown(slot, max_model_len)
