"""Which waiting request may start beside a draft. Owns no queue and changes none."""

from __future__ import annotations

import math

from engine.config import SchedulerConfig
from engine.draft import Draft
from engine.memory.blocks import Match
from engine.memory.pool import MemoryPool
from engine.sequence import Sequence, State
from engine.waiting import WaitingLine

_LOOK_AHEAD = 64  # waiting requests that may overtake the first
_LITTLE = 0.25  # of a prompt: whoever has no more to compute displaces nobody


class Admission:
    """The one at the head first, within what memory allows.

    Args:
        config: `max_overtaken`, and what decides whether room is left to compute prompts layer-wise.
        pool: the one door to memory.
        max_model_len: tokens at which a sequence ends.
    """

    def __init__(self, config: SchedulerConfig, pool: MemoryPool, max_model_len: int) -> None:
        self._max_overtaken = config.max_overtaken
        self._largest_staged = config.max_num_batched_tokens if _leaves_room(config) else 0
        self._pool = pool
        self._max_model_len = max_model_len

    def next(
        self, waiting: WaitingLine, active: list[Sequence], draft: Draft
    ) -> tuple[Sequence, Match | None] | None:
        """Who is next, and what of its tokens is there, or will be when the draft has run; None for nobody.

        The request that came first; or, if it could only start at the cost of KV that others wait for,
        the one of those that has the least to compute, half as much as the first at most.

        With more conversations than memory holds, first come first served would give up each one's KV
        just before its next turn, and compute everything again.
        """
        head = waiting.head
        if head.num_in_flight:  # preempted a moment ago, and what to compute again is not known yet
            return None
        match = self._match(head, draft)
        if head.num_overtaken < self._max_overtaken and self._displaces(head, match, active, draft):
            most = _to_compute(head, match) // 2
            other = min(waiting.first(_LOOK_AHEAD)[1:], key=self._least_to_compute, default=head)
            if self._least_to_compute(other) <= most:
                others_match = self._match(other, draft)
                if _to_compute(other, others_match) <= most:
                    return other, others_match
        return head, match

    def must_wait(self, seq: Sequence, match: Match | None, draft: Draft) -> bool:
        """Whether to wait for KV that a live sequence is about to compute anyway."""
        return self._pool.prefixes.must_wait(seq.chain, match, seq.num_tokens, draft.number)

    def num_lacking(self, seq: Sequence, match: Match | None, active: list[Sequence], draft: Draft) -> int:
        """Chunks that memory is too short by for a waiting sequence to start now; 0 or less if it may."""
        need = self._pool.chunks_to_open(match, min(seq.num_tokens + 1, self._max_model_len))
        room = draft.room(self._step_to_leave(seq, active, draft)) - self._promised(active, draft)
        return need + self._watermark(seq, active) - room if need else 0

    def _step_to_leave(self, seq: Sequence, active: list[Sequence], draft: Draft) -> int:
        """Tokens of a step that there is to be room for once the sequence has started: the next prompt is
        computed layer-wise if it can be computed in one.
        """
        if not active or self._pool.layer_wise is None:
            return 1
        return max(1, min(seq.num_tokens, self._largest_staged - draft.num_tokens))

    def _match(self, seq: Sequence, draft: Draft) -> Match | None:
        return self._pool.match(seq.chain, seq.tokens, seq.num_tokens, draft.number)

    def _displaces(self, seq: Sequence, match: Match | None, active: list[Sequence], draft: Draft) -> bool:
        """Whether much of a request's KV would take the place of what other waiting requests will read."""
        pool, lacks = self._pool, _to_compute(seq, match)
        if not active or lacks <= seq.num_tokens * _LITTLE:
            return False
        # The arena's idle tail is room, but not for the piece that computes there.
        piece = min(lacks, draft.tokens_left)
        left = draft.room(piece) - self._promised(active, draft)
        left -= pool.chunks_to_open(match, seq.num_tokens + 1)
        # What others want is part of what can be evicted, and takes a look at every slot.
        return left < pool.num_evictable and left < pool.chunks_wanted(but_by=seq.request_id)

    def _least_to_compute(self, seq: Sequence) -> float:
        """Tokens that the slot does not hold which held a request's beginning when it came; infinity if that
        slot is in use. A quick look, since a step may ask it of every waiting request.
        """
        prefixes = self._pool.prefixes
        if seq.num_in_flight or seq.wants is None or seq.wants not in prefixes:
            return math.inf
        slot = prefixes[seq.wants]
        if slot.tokens is None or seq.request_id not in slot.wanted:
            return math.inf
        return max(seq.num_lacking, seq.num_tokens - len(slot.tokens))

    def _watermark(self, seq: Sequence, active: list[Sequence]) -> int:
        """Chunks to leave for sequences to grow into, so that starting one more does not preempt one soon:
        a hundredth of the pool, or what they can need at most.
        """
        if not active:
            return 0
        pool, longest = self._pool, self._max_model_len
        most = pool.chunks_to_open(None, seq.longest(longest)) - pool.chunks_to_open(None, seq.num_tokens)
        most += pool.kv.num_missing([(one.held_slot, one.longest(longest)) for one in active])
        prompts = [one for one in active if one.state is State.PREFILLING]
        most -= pool.kv.num_missing([(one.held_slot, one.num_tokens) for one in prompts])  # promised to them
        return min(most, max(pool.kv.geometry.num_groups, pool.chunks.total // 100))

    def _promised(self, active: list[Sequence], draft: Draft) -> int:
        """Chunks that admitted prompts still lack, beyond what this draft gives them."""
        planned = {id(seq): count for seq, count, _ in draft.pieces}
        total = 0
        for seq in active:
            if seq.state is State.PREFILLING:
                whole = self._pool.chunks_to_grow(seq.held_slot, seq.num_tokens)
                total += whole - self._pool.chunks_to_grow(
                    seq.held_slot, seq.num_computed + planned.get(id(seq), 0)
                )
        return total


def _leaves_room(config: SchedulerConfig) -> bool:
    """By turns, somebody leaves for the next prompt."""
    return config.layer_wise and config.policy == "fcfs"


def _to_compute(seq: Sequence, match: Match | None) -> int:
    return seq.num_tokens - (match.num_tokens if match else 0)
