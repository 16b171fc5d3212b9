"""The one door to memory for the scheduler: KV slots and activations out of one pool of chunks.

A step reserves all it needs, KV growth and activations, in one all-or-nothing transaction before it
starts (eLLM section 4; without that, two half-served steps can block each other for good). Shortage is
a value. In `static` mode the largest activation is set aside at start and never lent.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from engine.config import Mode
from engine.errors import ConservationError, DriverError
from engine.memory.arena import ActivationArena, BufferSpec
from engine.memory.chunks import ChunkPool
from engine.memory.kv_cache import KvCache, KvGeometry
from engine.memory.virtual_tensor import VirtualTensor
from engine.memory.vmm import VirtualMemory
from engine.messages import MemorySnapshot

logger = logging.getLogger(__name__)


class MemoryPool:
    """All memory of one engine that is not weights.

    Args:
        vm: the driver.
        total: chunks of the pool.
        mode: `elastic` or `static`.
        geometry: how KV fills chunks.
        specs: the buffers of a forward pass.
        num_slots: sequences that may hold KV at once.
        max_model_len: tokens of the longest sequence.
        max_step_tokens: tokens of the largest step.
        dtype: of keys and values.
        padded_sizes: tokens and rows that a step may be filled up to (CUDA graphs have fixed sizes).
    """

    def __init__(  # noqa: PLR0913 - every argument is a fact of another owner
        self,
        vm: VirtualMemory,
        total: int,
        mode: Mode,
        geometry: KvGeometry,
        specs: Sequence[BufferSpec],
        num_slots: int,
        max_model_len: int,
        max_step_tokens: int,
        dtype: torch.dtype,
        padded_sizes: Sequence[int] = (),
    ) -> None:
        self._vm = vm
        self._mode = mode
        self.chunks = ChunkPool(vm, total)
        if mode == "static":
            self.chunks.create_all()
        self.arena = ActivationArena(self.chunks, specs, max_step_tokens, num_slots, padded_sizes)
        guard = self._take_or_raise(1, "guard")[0]
        self.kv = KvCache(self.chunks, geometry, num_slots, max_model_len, dtype, guard)
        self.kv.layer_views[0][0].zero_()
        self._free_slots = list(range(num_slots))
        self._warm_rows = [0] * num_slots  # an upper bound: rows may have been stolen since
        self._kv_tokens = [0] * num_slots
        floor = self.arena.max_chunks if mode == "static" else 1
        self.arena.tensor.map(range(floor), self._take_or_raise(floor, "activation"))

    @property
    def num_free_slots(self) -> int:
        """Slots that `open_slot` could give out."""
        return len(self._free_slots)

    def room_for_kv(self, num_tokens: int, num_rows: int) -> int:
        """Chunks KV could gain beside a step of that size; negative if the step alone is too large."""
        spare = self.arena.num_backed - self.arena.chunks_for(num_tokens, num_rows)
        if self._mode == "static":
            spare = min(spare, 0)
        return self.chunks.num_free + spare

    def fits_step(self, num_tokens: int, num_rows: int) -> bool:
        """Whether a step of that size could run now if KV stayed as it is."""
        is_within = self.arena.chunks_for(num_tokens, num_rows) <= self.arena.max_chunks
        return is_within and self.room_for_kv(num_tokens, num_rows) >= 0

    def chunks_to_grow(self, slot: int, num_tokens: int) -> int:
        """Chunks the slot lacks to hold `num_tokens` tokens."""
        return self.kv.num_missing(((slot, num_tokens),))

    def open_slot(self, num_tokens: int) -> int | None:
        """An empty slot, or None. Best fit (eLLM): the fewest warm rows that still cover the sequence."""
        if not self._free_slots:
            return None
        need = self.kv.geometry.rows_for(num_tokens)
        slot = self._covering_slot(need)
        if slot is None:
            slot = max(self._free_slots, key=lambda s: (self._warm_rows[s], -s))
        self._free_slots.remove(slot)
        return slot

    def close_slot(self, slot: int) -> None:
        """Give a slot and its KV back. The chunks stay mapped until somebody needs them."""
        self._warm_rows[slot] = self.kv.num_rows(slot)
        self.kv.clear(slot)
        self._kv_tokens[slot] = 0
        self._free_slots.append(slot)

    def reserve(self, growth: Sequence[tuple[int, int]], num_tokens: int, num_rows: int) -> bool:
        """Back everything a step needs, or nothing.

        Args:
            growth: (slot, tokens it must hold after the step).
            num_tokens, num_rows: size of the step.

        Returns:
            False if memory is short or the driver refused; nothing has changed then.
        """
        wanted = [
            (self.arena.tensor, row)
            for row in self.arena.missing_rows(self.arena.chunks_for(num_tokens, num_rows))
        ]
        for slot, tokens in growth:
            wanted += self.kv.missing(slot, tokens)
        kv_chunks = sum(tensor is not self.arena.tensor for tensor, _ in wanted)
        if kv_chunks > self.room_for_kv(num_tokens, num_rows) or not self._back(wanted, num_tokens, num_rows):
            return False
        for slot, tokens in growth:
            self.kv.grown(slot, tokens)
            self._kv_tokens[slot] = tokens
        return True

    def launched(self, step: int) -> None:
        """A reserved step is about to run: nothing it may read is unmapped before it finishes."""
        self.chunks.launched(step)

    def finished(self, step: int) -> None:
        """The step has finished on the device."""
        self.chunks.finished(step)

    def trim(self) -> int:
        """Give every free chunk back to the system, the arena's idle tail included; bytes released."""
        if self._mode == "elastic":
            self.arena.shrink(1)
        return self.chunks.trim() * self._vm.chunk_bytes

    def snapshot(self) -> MemorySnapshot:
        """Chunks by state, now."""
        chunks = self.chunks
        return MemorySnapshot(
            chunk_bytes=self._vm.chunk_bytes,
            total=chunks.total,
            free=chunks.num_free,
            kv=chunks.num_owned("kv"),
            activation=chunks.num_owned("activation"),
            guard=chunks.num_owned("guard"),
            retiring=chunks.num_retiring,
            warm=chunks.num_warm,
            created=chunks.num_created,
            kv_tokens=sum(self._kv_tokens),
            driver_calls=self._vm.num_calls,
        )

    def check(self) -> None:
        """Raise ConservationError if a chunk is lost or counted twice, or the counts disagree."""
        self.chunks.check()
        now = self.snapshot()
        if now.free + now.kv + now.activation + now.guard + now.retiring != now.total:
            raise ConservationError(f"free + owned + retiring != total: {now}")

    def _covering_slot(self, need: int) -> int | None:
        for slot in sorted(self._free_slots, key=lambda s: self._warm_rows[s]):
            if self._warm_rows[slot] >= need:
                found = self.kv.num_warm_rows(slot, need)
                if found >= need:
                    return slot
                self._warm_rows[slot] = found
        return None

    def _back(self, wanted: Sequence[tuple[VirtualTensor, int]], num_tokens: int, num_rows: int) -> bool:
        adopted = [(tensor, row) for tensor, row in wanted if tensor.can_adopt(row)]
        empty = [(tensor, row) for tensor, row in wanted if tensor.is_empty(row)]
        if len(adopted) + len(empty) < len(wanted):
            return False  # a shared chunk is still being read where the new one has to go
        for tensor, row in adopted:
            tensor.adopt(row)
        short = len(empty) - self.chunks.num_free
        if short > 0 and self._mode == "elastic":
            self.arena.shrink(max(self.arena.num_backed - short, self.arena.chunks_for(num_tokens, num_rows)))
        if self._map(empty):
            return True
        for tensor, row in adopted:
            tensor.drop([row])
        return False

    def _map(self, wanted: Sequence[tuple[VirtualTensor, int]]) -> bool:
        by_tensor: dict[VirtualTensor, list[int]] = {}
        for tensor, row in wanted:
            by_tensor.setdefault(tensor, []).append(row)
        mapped: list[tuple[VirtualTensor, list[int]]] = []
        for tensor, rows in by_tensor.items():
            if not self._take_and_map(tensor, rows):
                for done, done_rows in mapped:
                    done.drop(done_rows)
                return False
            mapped.append((tensor, rows))
        return True

    def _take_and_map(self, tensor: VirtualTensor, rows: list[int]) -> bool:
        chunks = self.chunks.take(len(rows), tensor.owner)
        if chunks is None:
            return False
        try:
            tensor.map(rows, chunks)
        except DriverError as error:
            logger.warning("the step has to wait for memory: %s", error)
            self.chunks.put_back(chunks)
            return False
        return True

    def _take_or_raise(self, count: int, owner: str) -> list[int]:
        chunks = self.chunks.take(count, owner)
        if chunks is None:
            raise ConservationError(f"the pool of {self.chunks.total} chunks is too small to start")
        return chunks
