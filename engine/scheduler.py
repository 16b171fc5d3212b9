"""Which tokens the next step computes, and who has to wait. Owns the queues; owns no memory.

Continuous batching with chunked prefill, first come first served. A step is drafted against the
free chunks: running sequences first, one token each, then prefills in order of arrival, cut to what
tokens and memory allow, then new requests. When a running sequence cannot grow, the sequence that
arrived last gives its KV up and is computed again later; what it has already said stays said. So the
oldest sequence always makes progress, and with it everybody in turn.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Collection, Iterator

from engine.config import SchedulerConfig
from engine.memory.pool import MemoryPool
from engine.messages import FinishReason, Piece, StepPlan, TokenDelta, TokenLogprobs
from engine.sequence import Sequence, State


class Draft:
    """A step being put together: what it holds so far, and whether one more piece fits."""

    def __init__(self, pool: MemoryPool, max_tokens: int) -> None:
        self._pool = pool
        self._max_tokens = max_tokens
        self.pieces: list[tuple[Sequence, int, bool]] = []
        self.num_tokens = 0
        self._num_rows = 0
        self._kv_chunks = 0

    @property
    def growth(self) -> list[tuple[int, int]]:
        """(slot, tokens after the step) of every sequence in the draft."""
        return [(_slot(seq), seq.num_computed + count) for seq, count, _ in self.pieces]

    @property
    def size(self) -> tuple[int, int]:
        """Tokens and rows of logits."""
        return self.num_tokens, self._num_rows

    def room(self, extra_tokens: int = 0) -> int:
        """Chunks left for KV if the step had that many tokens more."""
        return self._pool.room_for_kv(self.num_tokens + extra_tokens, self._num_rows + 1) - self._kv_chunks

    def try_add(self, seq: Sequence, count: int) -> bool:
        """Add the sequence's next `count` tokens if tokens and memory allow."""
        chunks = self._pool.chunks_to_grow(_slot(seq), seq.num_computed + count)
        if self.num_tokens + count > self._max_tokens or chunks > self.room(count):
            return False
        samples = seq.num_computed + count == seq.num_tokens
        self.pieces.append((seq, count, samples))
        self.num_tokens += count
        self._num_rows += samples
        self._kv_chunks += chunks
        return True

    def try_add_decodes(self, sequences: list[Sequence]) -> bool:
        """Add the next token of all these running sequences to an empty draft, or of none.

        The same as `try_add` of each, which nearly always succeeds, at a tenth of its time.
        """
        count = len(sequences)
        chunks = self._pool.kv.num_missing([(_slot(seq), seq.num_computed + 1) for seq in sequences])
        if count > self._max_tokens or chunks > self._pool.room_for_kv(count, count):
            return False
        self.pieces = [(seq, 1, True) for seq in sequences]
        self.num_tokens = self._num_rows = count
        self._kv_chunks = chunks
        return True


class Scheduler:
    """Drafts steps and keeps the books of every sequence.

    Args:
        config: limits of a step.
        pool: the one door to memory.
        max_model_len: tokens at which a sequence ends.
        eos_token_ids: tokens at which it ends by itself.
    """

    def __init__(
        self, config: SchedulerConfig, pool: MemoryPool, max_model_len: int, eos_token_ids: Collection[int]
    ) -> None:
        self._config = config
        self._pool = pool
        self._max_model_len = max_model_len
        self._eos = frozenset(eos_token_ids)
        self._waiting: list[Sequence] = []
        self._active: list[Sequence] = []
        self._by_id: dict[str, Sequence] = {}
        self._num_steps = 0
        self.num_preemptions = 0
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.finished: Counter[FinishReason] = Counter()

    @property
    def num_waiting(self) -> int:
        """Requests without KV, preempted ones included."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold KV."""
        return len(self._active)

    def add(self, seq: Sequence) -> None:
        """Queue a new request."""
        self._by_id[seq.request_id] = seq
        insort(self._waiting, seq, key=_age)

    def get(self, request_id: str) -> Sequence | None:
        """The unfinished sequence of that request."""
        return self._by_id.get(request_id)

    def unfinished(self) -> list[Sequence]:
        """Every sequence that has not ended."""
        return list(self._by_id.values())

    def schedule(self) -> tuple[StepPlan, list[tuple[int, int]]] | None:
        """The next step and the KV growth to reserve for it; None if there is nothing to compute, or
        nothing before the steps in flight have ended.

        Side effects: preempts sequences, opens slots for admitted ones. Backs no memory.
        """
        draft = Draft(self._pool, self._config.max_num_batched_tokens)
        is_short = self._add_running(draft)
        self._add_prefilling(draft)
        if not is_short:
            self._admit(draft)
        while not draft.pieces and len(self._active) > 1 and not self._is_unsettled():
            self.preempt(self._active[-1])  # several half-prefilled prompts hold everything: one yields
            self._add_prefilling(draft)
        if not draft.pieces:
            return None
        self._num_steps += 1
        return self._plan(draft), draft.growth

    def launched(self, plan: StepPlan) -> list[Sequence]:
        """Count a step that has been launched as done; the sequences it chooses tokens for, in its order.

        The next step may be scheduled on top of it before the host has read a single token.
        """
        sampling = []
        for piece in plan.pieces:
            seq = self._by_id[piece.request_id]
            seq.num_computed += len(piece.token_ids)
            if piece.samples:
                seq.num_in_flight += 1
                seq.is_new_to_slot = False
                if seq.state is State.PREFILLING:
                    seq.move(State.RUNNING)
                sampling.append(seq)
        return sampling

    def commit(self, seq: Sequence, token: int, logprobs: TokenLogprobs | None) -> TokenDelta | None:
        """Write the token of a finished step back; the delta to publish.

        None if the sequence ended while the step was in flight: whatever it chose is not said.
        """
        if self._by_id.get(seq.request_id) is not seq:  # its id may belong to another request by now
            return None
        seq.num_in_flight -= 1
        return self._append(seq, token, logprobs)

    def finish(self, seq: Sequence, reason: FinishReason, error: str | None = None) -> TokenDelta:
        """End a sequence now, whatever its state, and take its memory back."""
        self._remove(seq)
        self.finished[reason] += 1
        return TokenDelta(
            seq.request_id, (), finish_reason=reason, error=error, num_preemptions=seq.num_preemptions
        )

    def preempt(self, seq: Sequence) -> None:
        """Take a sequence's KV; it waits again, at the place its arrival gives it."""
        self._release(seq)
        seq.move(State.WAITING)
        seq.num_preemptions += 1
        self.num_preemptions += 1
        insort(self._waiting, seq, key=_age)

    def latest(self, request_ids: Collection[str]) -> Sequence:
        """The one of these sequences that arrived last."""
        return max((self._by_id[request_id] for request_id in request_ids), key=_age)

    def _add_running(self, draft: Draft) -> bool:
        """One token for every running sequence; whether memory was too short for all of them."""
        running = [seq for seq in self._active if seq.state is State.RUNNING and not self._is_complete(seq)]
        if draft.try_add_decodes(running):
            return False
        is_short = False
        for seq in running:
            while seq.state is State.RUNNING and not draft.try_add(seq, 1):
                is_short = True
                if self._pool.chunks.num_retiring:
                    # Enough may be free once the step in flight ends; what another victim gave up would
                    # not be free sooner. Until then this sequence and the later ones sit out.
                    return True
                self.preempt(self._active[-1])  # never one already in the draft: those arrived earlier
        return is_short

    def _add_prefilling(self, draft: Draft) -> None:
        for seq in self._active:
            if seq.state is State.PREFILLING:
                self._add_piece(draft, seq)

    def _add_piece(self, draft: Draft, seq: Sequence) -> bool:
        """As many of the sequence's next tokens as fit."""
        limit = self._config.prefill_piece_tokens or self._config.max_num_batched_tokens
        left = self._config.max_num_batched_tokens - draft.num_tokens
        for count in _halvings(min(seq.num_tokens - seq.num_computed, left, limit)):
            if draft.try_add(seq, count):
                return True
        return False

    def _admit(self, draft: Draft) -> None:
        """Start waiting requests while the whole of what they know fits beside the draft."""
        watermark = max(self._pool.kv.geometry.num_groups, self._pool.chunks.total // 100)
        while (
            self._waiting
            and self._pool.num_free_slots
            and draft.num_tokens < self._config.max_num_batched_tokens
        ):
            seq = self._waiting[0]
            if seq.num_in_flight:  # preempted a moment ago, and what to compute again is not known yet
                return
            need = self._pool.kv.geometry.chunks_for(min(seq.num_tokens + 1, self._max_model_len))
            if need + (watermark if self._active else 0) > draft.room(1) - self._promised(draft):
                return
            slot = self._pool.open_slot(seq.num_tokens + 1)
            if slot is None:
                return
            del self._waiting[0]
            seq.slot = slot
            seq.move(State.PREFILLING)
            insort(self._active, seq, key=_age)
            if not self._add_piece(draft, seq):
                return

    def _promised(self, draft: Draft) -> int:
        """Chunks that admitted prompts still lack, beyond what this draft gives them."""
        planned = {id(seq): count for seq, count, _ in draft.pieces}
        total = 0
        for seq in self._active:
            if seq.state is State.PREFILLING:
                whole = self._pool.chunks_to_grow(_slot(seq), seq.num_tokens)
                total += whole - self._pool.chunks_to_grow(
                    _slot(seq), seq.num_computed + planned.get(id(seq), 0)
                )
        return total

    def _plan(self, draft: Draft) -> StepPlan:
        ordered = sorted(draft.pieces, key=lambda entry: entry[1] > 1)
        pieces = tuple(
            Piece(
                seq.request_id,
                _slot(seq),
                seq.num_computed,
                seq.next_tokens(count),
                samples,
            )
            for seq, count, samples in ordered
        )
        return StepPlan(self._num_steps, pieces, sum(count == 1 for _, count, _ in ordered))

    def _append(self, seq: Sequence, token: int, logprobs: TokenLogprobs | None) -> TokenDelta:
        if not seq.output_token_ids:
            self.prompt_tokens += len(seq.prompt_token_ids)
        seq.output_token_ids.append(token)
        self.generated_tokens += 1
        reason = self._finish_reason(seq, token)
        if reason:
            self._remove(seq)
            self.finished[reason] += 1
        entries = (logprobs,) if logprobs else ()
        return TokenDelta(seq.request_id, (token,), entries, reason, num_preemptions=seq.num_preemptions)

    def _finish_reason(self, seq: Sequence, token: int) -> FinishReason | None:
        sampling = seq.sampling
        if (token in self._eos and not sampling.ignore_eos) or token in sampling.stop_token_ids:
            return "stop"
        num_known = seq.num_tokens - seq.num_in_flight
        if len(seq.output_token_ids) >= sampling.max_tokens or num_known >= self._max_model_len:
            return "length"
        return None

    def _is_unsettled(self) -> bool:
        """Whether a step in flight will end sequences or free chunks."""
        return self._pool.chunks.num_retiring > 0 or any(seq.num_in_flight for seq in self._active)

    def _is_complete(self, seq: Sequence) -> bool:
        """Whether the tokens in flight are its last ones, whatever they turn out to be."""
        return seq.num_outputs >= seq.sampling.max_tokens or seq.num_tokens >= self._max_model_len

    def _remove(self, seq: Sequence) -> None:
        if seq.slot is None:
            self._waiting.remove(seq)
        else:
            self._release(seq)
        seq.move(State.FINISHED)
        del self._by_id[seq.request_id]

    def _release(self, seq: Sequence) -> None:
        self._active.remove(seq)
        self._pool.close_slot(_slot(seq))
        seq.slot = None
        seq.num_computed = 0
        seq.is_new_to_slot = True


def _age(seq: Sequence) -> tuple[float, str]:
    return seq.arrival_s, seq.request_id


def _slot(seq: Sequence) -> int:
    if seq.slot is None:
        raise ValueError(f"sequence {seq.request_id} holds no slot")
    return seq.slot


def _halvings(count: int) -> Iterator[int]:
    while count > 0:
        yield count
        count //= 2
