"""A step being put together, against the memory there is."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Sequences

from engine.config import SchedulerConfig
from engine.memory.kv_cache import KvCache
from engine.memory.pool import MemoryPool
from engine.messages import Piece, StepPlan
from engine.sequence import Sequence, State


class Draft:
    """What a step holds so far, and whether one more piece fits.

    Args:
        number: counts up; blocks that a draft would compute carry it until the step is launched.
        max_tokens: of the step while somebody decodes.
        largest_step: of a step in which nobody does.
    """

    def __init__(self, number: int, pool: MemoryPool, max_tokens: int, largest_step: int) -> None:
        self.number = number
        self._pool = pool
        self._max_tokens = max_tokens
        self._largest_step = largest_step
        self._num_decodes = 0
        self.pieces: list[tuple[Sequence, int, bool]] = []
        self.num_tokens = 0
        self._num_rows = 0
        self._kv_chunks = 0
        self._staged: Piece | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.pieces and self._staged is None

    @property
    def growth(self) -> list[tuple[int, int]]:
        """(slot, tokens after the step) of every sequence in the draft."""
        return [(seq.held_slot, seq.num_computed + count) for seq, count, _ in self.pieces]

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of pieces of prompts."""
        return self.num_tokens - self._num_decodes

    @property
    def tokens_left(self) -> int:
        """Tokens the step may still gain."""
        return (self._max_tokens if self._num_decodes else self._largest_step) - self.num_tokens

    def plan(self, step: int) -> StepPlan:
        """The draft as what a step computes."""
        ordered = sorted(self.pieces, key=lambda entry: entry[1] > 1)
        pieces = tuple(
            Piece(
                seq.request_id,
                seq.held_slot,
                seq.seat,
                seq.num_computed,
                seq.next_tokens(count),
                samples,
                seq.shared_slot,
                seq.shared_tokens,
            )
            for seq, count, samples in ordered
        )
        copies = tuple(seq.copy for seq, _, _ in ordered if seq.copy is not None)
        num_decodes = sum(count == 1 for _, count, _ in ordered)
        if self._staged is not None:
            pieces += (self._staged,)
        return StepPlan(step, pieces, num_decodes, copies, self._staged is not None)

    def room(self, extra_tokens: int = 0) -> int:
        """Chunks left for KV if the step had that many tokens more."""
        return self._pool.room_for_kv(self.num_tokens + extra_tokens, self._num_rows + 1) - self._kv_chunks

    def num_missing(self, sequences: list[Sequence]) -> int:
        """Chunks that are missing for the next token of all these."""
        chunks = self._pool.kv.num_missing([(seq.held_slot, seq.num_computed + 1) for seq in sequences])
        return max(1, chunks - self.room(len(sequences)))

    def try_add(self, seq: Sequence, count: int) -> bool:
        """Add the sequence's next `count` tokens if tokens and memory allow."""
        end = seq.num_computed + count
        chunks = self._pool.chunks_to_grow(seq.held_slot, end)
        if count > self.tokens_left or chunks > self.room(count):
            return False
        samples = end == seq.num_tokens
        self.pieces.append((seq, count, samples))
        self.num_tokens += count
        self._num_rows += samples
        self._kv_chunks += chunks
        self._num_decodes += seq.is_decoding
        self._pool.prefixes.drafted(seq.held_slot, end, self.number)
        return True

    def stage(self, seq: Sequence, slot: int) -> None:
        """Add a whole waiting prompt that is computed layer-wise, in a slot that is not its own."""
        tokens = seq.tokens(0, seq.num_tokens)
        self._staged = Piece(seq.request_id, slot, seq.seat, 0, tokens, samples=True)
        self.num_tokens += len(tokens)
        self._num_rows += 1

    def try_add_decodes(self, sequences: list[Sequence]) -> bool:
        """Add the next token of all these running sequences to an empty draft, or of none.

        The same as `try_add` of each, which nearly always succeeds, at a tenth of its time.
        """
        count = len(sequences)
        chunks = self._pool.kv.num_missing([(seq.held_slot, seq.num_computed + 1) for seq in sequences])
        if count > self._max_tokens or chunks > self._pool.room_for_kv(count, count):
            return False
        self.pieces = [(seq, 1, True) for seq in sequences]
        self.num_tokens = self._num_rows = count
        self._kv_chunks = chunks
        self._num_decodes = count
        return True


def outgrowing(
    active: Sequences[Sequence], kv: KvCache, num_tokens: int, limits: SchedulerConfig, max_model_len: int
) -> Iterator[tuple[int, int]]:
    """(slot, tokens it will hold) of sequences that will outgrow what is backed within so many tokens."""
    for seq in active:
        end = min(seq.num_computed + num_tokens, seq.longest(max_model_len))
        if seq.state is State.PREFILLING:
            end = min(seq.num_tokens, seq.num_computed + limits.max_num_batched_tokens)
        if end > kv.end(seq.held_slot) * kv.geometry.tokens_per_chunk:
            yield seq.held_slot, end
