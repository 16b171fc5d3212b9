"""What will be backed soon, mapped by another thread while steps run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from engine.memory.chunks import ChunkPool
from engine.memory.kv_cache import KvCache
from engine.memory.kv_slots import KvSlots
from engine.memory.virtual_tensor import VirtualTensor
from engine.memory.warm_chunks import Place

_MAX_SENT = 256  # chunks on their way at once: what they cost to bring back bounds a wait to some 10 ms
_MAX_HELD = 1024  # chunks kept for growth: that of 128 sequences in 8 layer groups, or of two long prompts
_MAPPED_S = 71e-6  # to unmap a chunk where it was last and map it elsewhere (H100: 15,318 calls took 0.544 s)
_LEAST_AT_ONCE = 64  # places that the engine loop maps itself rather than wait for a thread


class MappingAhead:
    """Has the mapping thread bring free chunks to where they will be needed. They stay free all the while.

    Args:
        chunks, kv, slots: of the pool.
        shrink_arena: takes up to so many chunks from the arena's idle tail.
        prepares_slots: whether an empty slot may be prepared for a prompt that nobody has sent yet.
    """

    def __init__(
        self,
        chunks: ChunkPool,
        kv: KvCache,
        slots: KvSlots,
        shrink_arena: Callable[[int], object],
        prepares_slots: bool,
    ) -> None:
        self._chunks = chunks
        self._kv = kv
        self._slots = slots
        self._shrink_arena = shrink_arena
        self._prepares_slots = prepares_slots
        self._growth: set[int] = set()  # chunks that are where they will be needed: for growth
        self._coming: set[int] = set()  # and for a sequence that is to come back

    def grow(self, growth: Iterable[tuple[int, int]], prompt_tokens: int) -> None:
        """Prepare what sequences will grow into.

        Args:
            growth: (slot, tokens) of slots that will soon hold so many.
            prompt_tokens: of a prompt that might come next. An empty slot is prepared for it from chunks
                that are mapped nowhere, once nothing else is to do.
        """
        chunks = self._chunks
        chunks.receive()
        room = _MAX_SENT - chunks.num_sent
        targets: list[Place] = []
        held: set[int] = set()
        for slot, tokens in growth:
            if len(held) + len(targets) >= _MAX_HELD:
                break
            for tensor, row in self._kv.missing(slot, tokens):
                chunk = tensor.mapped_at(row)
                if chunk is not None:
                    held.add(chunk)
                elif tensor.is_empty(row):
                    targets.append((tensor, row))
        chunks.hold(held | self._coming)
        self._growth, self._coming = held, set()
        if targets:
            del targets[max(0, room) :]
            self._slots.evict(len(targets) - chunks.num_spare)
            self._shrink_arena(len(targets) - chunks.num_spare - chunks.num_retiring)
            chunks.send_ahead(targets, is_held=True)
        elif chunks.num_unmapped and not chunks.num_sent and self._prepares_slots:
            chunks.send_ahead(self._slots.unprepared(prompt_tokens)[: min(room, chunks.num_unmapped)])

    def is_ready(
        self, places: Sequence[tuple[VirtualTensor, int]], step_s: float, make_room: Callable[[int], None]
    ) -> bool:
        """Whether so little has to be mapped to back these places that the step in flight hides it. If not,
        the mapping thread is at it: 7,880 chunks that were mapped elsewhere made two streams wait for 0.54 s.

        Args:
            step_s: how long steps take; infinity if there are none to hide anything from.
            make_room: lets so many chunks become free.
        """
        if math.isinf(step_s):
            return True
        chunks = self._chunks
        chunks.receive()
        lacking = [(tensor, row) for tensor, row in places if tensor.mapped_at(row) is None]
        at_once = int(step_s / 2 / _MAPPED_S)
        if len(lacking) <= max(_LEAST_AT_ONCE, at_once):
            return True
        make_room(len(lacking))
        self._coming = {chunk for tensor, row in places if (chunk := tensor.mapped_at(row)) is not None}
        chunks.hold(self._growth | self._coming)
        if not chunks.num_spare:
            return not chunks.num_sent  # the rest can only be had from what is held for growth
        empty = [(tensor, row) for tensor, row in lacking if tensor.is_empty(row)]
        num_sent = max(_MAX_SENT, at_once) - chunks.num_sent
        chunks.send_ahead(empty[: max(0, num_sent)], is_held=True)
        return False
