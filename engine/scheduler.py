"""Which tokens the next step computes, and who has to wait. Owns the queues; owns no memory.

Continuous batching with chunked prefill, the request whose first token is due first comes first. A step is
drafted against the memory there is: running sequences first, one token each, then prefills in order of
arrival, cut to what tokens and memory allow, then new requests, which start behind whatever of their prompt
is there. When a running sequence cannot grow, the sequence that arrived last is parked (`engine.turns`); if
that is impossible it gives its KV up and is computed again later, and what it has already said stays said.
So the oldest sequence always makes progress, and with it everybody in turn.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import Counter
from collections.abc import Callable, Collection, Iterator

from engine.admission import Admission
from engine.config import SchedulerConfig
from engine.draft import Draft, outgrowing
from engine.fetching import Fetching
from engine.memory.blocks import Match
from engine.memory.pool import MemoryPool
from engine.memory.prefix import NO_DRAFT
from engine.messages import FinishReason, StepPlan, TokenDelta, TokenLogprobs
from engine.pace import Pace, backlog_of
from engine.queue_time import QueueTime
from engine.sequence import Sequence, State
from engine.staging import Staging
from engine.step_times import StepTimes, StepWork
from engine.turns import Turns
from engine.waiting import WaitingLine

_NEVER_ALONE = 1.5  # a prompt takes so much longer than its tokens: decodes are computed beside it


class Scheduler:
    """Drafts steps and keeps the books of every sequence.

    Args:
        config: limits of a step.
        pool: the one door to memory.
        max_model_len: tokens at which a sequence ends.
        eos_token_ids: tokens at which it ends by itself.
        clock: seconds that never go back; sequences arrive on the same one.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pool: MemoryPool,
        max_model_len: int,
        eos_token_ids: Collection[int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._pool = pool
        self._max_model_len = max_model_len
        self._eos = frozenset(eos_token_ids)
        self._admission = Admission(config, pool, max_model_len)
        self.step_times = StepTimes()
        self._pace = Pace(config, self.step_times)
        self._clock = clock
        self.turns = Turns(config, pool)
        self.waiting = WaitingLine(pool, by_deadline=config.policy == "slo")
        self._active: list[Sequence] = []
        self._by_id: dict[str, Sequence] = {}
        self.free_seats = list(range(config.max_num_seqs))[::-1]
        self._is_held_up = False
        self._num_lacking = 0  # chunks that the next waiting request lacks
        self.fetching = Fetching(pool, self.turns.decisions)
        self.staging = Staging(config, pool, self.step_times, self.turns, self.waiting)
        self.queue_time = QueueTime()
        self._num_drafts = self._num_steps = self.num_preemptions = 0
        self.prompt_tokens = self.generated_tokens = self.prefix_queries = self.prefix_hits = 0
        self.finished: Counter[FinishReason] = Counter()

    @property
    def num_waiting(self) -> int:
        """Requests without KV, preempted ones included."""
        return len(self.waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold KV on the device."""
        return len(self._active)

    @property
    def takes_turns(self) -> bool:
        """Whether sequences that run are to leave room for others soon."""
        return self._config.policy == "slo" and bool(self.turns.parked)

    def add(self, seq: Sequence) -> None:
        """Queue a new request."""
        self._by_id[seq.request_id] = seq
        self.waiting.add(seq)

    def get(self, request_id: str) -> Sequence | None:
        """The unfinished sequence of that request."""
        return self._by_id.get(request_id)

    def unfinished(self) -> list[Sequence]:
        """Every sequence that has not ended."""
        return list(self._by_id.values())

    def schedule(self) -> tuple[StepPlan, list[tuple[int, int]]] | None:
        """The next step and the KV growth to reserve for it; None if there is nothing to compute, or
        nothing before the steps in flight have ended.

        Preempts and parks sequences, opens slots for admitted ones. Backs no memory.
        """
        self._num_drafts += 1
        now_s = self._clock()
        self.staging.begin_draft(now_s)
        running = self._take_turns(now_s)
        more = self._active if len(running) < len(self._active) else []
        begun = [seq for seq in more if not seq.is_decoding and not seq.is_arriving]
        lacking = self.waiting.num_lacking_tokens + sum([seq.num_tokens - seq.num_computed for seq in begun])
        step_tokens = self._step_tokens(running, begun, now_s)
        draft = Draft(self._num_drafts, self._pool, step_tokens, self._config.largest_step)
        is_short = self._add_running(draft, running)
        self._add_prefilling(draft)
        self._num_lacking = 0
        if not is_short:
            self._admit(draft, running, now_s)
        self._is_held_up = len(self.waiting) > 0 and (is_short or draft.tokens_left > 0)
        if draft.is_empty and not self._is_unsettled() and self.turns.bring_back_any(now_s):
            return None
        while draft.is_empty and len(self._active) > 1 and not self._is_unsettled():
            self.preempt(self._active[-1])  # several half-prefilled prompts hold everything: one yields
            self._add_prefilling(draft)
        self.queue_time.step(now_s, draft.num_prompt_tokens, lacking - draft.num_prompt_tokens)
        if draft.is_empty:
            return None
        self._num_steps += 1
        return draft.plan(self._num_steps), draft.growth

    def launched(self, plan: StepPlan, work: StepWork) -> list[Sequence]:
        """Count a step that has been launched as done; the sequences it chooses tokens for, in its order.

        The next step may be scheduled on top of it before the host has read a single token.
        """
        sampling, per_block = [], self._pool.kv.geometry.tokens_per_chunk
        for piece in plan.pieces[: len(plan.pieces) - plan.has_staged]:
            seq = self._by_id[piece.request_id]
            seq.num_computed += len(piece.token_ids)
            if seq.num_computed // per_block > piece.start // per_block:
                self._pool.prefixes.computed(piece.slot, seq.num_computed)
            if seq.copy is not None:
                self._pool.prefixes.copied(piece.slot)
                seq.copy = None
            if piece.samples:
                seq.num_in_flight += 1
                seq.is_new_to_slot = False
                if seq.state is State.PREFILLING:
                    seq.move(State.RUNNING)
                sampling.append(seq)
        if plan.has_staged:
            self.free_seats.pop()
            sampling.append(self.staging.launched())
        self.turns.launched(self.step_times.predict(work))
        return sampling

    def commit(self, seq: Sequence, token: int, logprobs: TokenLogprobs | None) -> TokenDelta | None:
        """Write the token of a finished step back; the delta to publish.

        None if the sequence ended while the step was in flight: whatever it chose is not said.
        """
        if self._by_id.get(seq.request_id) is not seq:  # its id may belong to another request by now
            return None
        seq.read_one()
        return self._append(seq, token, logprobs)

    def finish(self, seq: Sequence, reason: FinishReason, error: str | None = None) -> TokenDelta:
        """End a sequence now, whatever its state, and take its memory back."""
        self._remove(seq, reason)
        self.finished[reason] += 1
        return TokenDelta(seq.request_id, (), (), reason, error, seq.num_preemptions, seq.num_cached_tokens)

    def take_in(self, seq: Sequence) -> None:
        """A sequence comes from another engine, parked, with a seat of `free_seats`."""
        self._by_id[seq.request_id] = seq
        self.turns.take_in(seq, "migrate_in")

    def let_go(self, seq: Sequence) -> None:
        """A parked sequence goes on in another engine, and is none of this one's any more."""
        self._release_parked(seq)
        del self._by_id[seq.request_id]

    def latest(self, request_ids: Collection[str]) -> Sequence:
        """The one of these sequences that arrived last."""
        return max((self._by_id[request_id] for request_id in request_ids), key=_age)

    def upcoming(self, num_tokens: int) -> Iterator[tuple[int, int]]:
        """(slot, tokens it will hold) of sequences that will outgrow what is backed within so many tokens."""
        return outgrowing(self._active, self._pool.kv, num_tokens, self._config, self._max_model_len)

    def _step_tokens(self, running: list[Sequence], begun: list[Sequence], now_s: float) -> int:
        """Tokens of the next step, decodes included. Who waits for memory or a seat hurries nobody."""
        waiting = None if self._is_held_up else self.waiting
        backlog = backlog_of(begun, waiting, now_s if self._config.policy == "slo" else None)
        bearable_s = self.turns.bearable_s(running, now_s) if backlog.due else 0.0
        return len(running) + self._pace.prompt_tokens(running, backlog, bearable_s, self.turns.prompt_share)

    def observe(self, work: StepWork, seconds: float) -> None:
        """A step of that size has taken so long."""
        predicted_s = self.step_times.predict(work)
        if self.step_times.is_fitted and predicted_s > 0:
            self.turns.observe(seconds / predicted_s)
        self.step_times.observe(work, seconds)

    def _decodable(self) -> list[Sequence]:
        """Running sequences, but those whose tokens in flight are the last, whatever they turn out to be."""
        longest = self._max_model_len
        running = (seq for seq in self._active if seq.state is State.RUNNING)
        return [seq for seq in running if seq.num_tokens < seq.longest(longest)]

    def _take_turns(self, now_s: float) -> list[Sequence]:
        """Sequences that were parked come back, and others are parked for them or for waiting prompts; those
        that decode then.
        """
        turns = self.turns
        self.waiting.pass_time(now_s, self.step_times.per_prompt_token(0) * _NEVER_ALONE)
        for seq in turns.settle():
            self._return(seq)
        self.prefix_hits += self.fetching.settle()
        running = self._decodable()
        has_prompts = len(self.waiting) > 0 or len(running) < len(self._active)
        turns.tick(now_s, running, has_prompts, self.waiting.is_late)
        if self._pool.parking is None:
            return running
        for seq, num_chunks, why in turns.victims(now_s, self._active, running, self._num_lacking):
            self._try_park(seq, num_chunks, why)
        turns.bring_back(now_s, self._num_lacking, self._active)
        running = [seq for seq in running if seq.state is State.RUNNING]
        turns.write_through(running, now_s)
        return running

    def _try_park(self, seq: Sequence, num_chunks: int, why: str) -> bool:
        """Move a running sequence off the device, if the balloon has room for it."""
        if not self.turns.park(seq, num_chunks, why):
            return False
        self._active.remove(seq)
        return True

    def _return(self, seq: Sequence) -> None:
        """A parked sequence is on the device again, unless its KV was lost; then it is computed again."""
        if seq.backing.is_lost:
            return self.preempt(seq)
        seq.slot, seq.num_outputs_before = self.turns.take_back(seq), seq.num_outputs
        seq.move(State.RUNNING)
        insort(self._active, seq, key=_age)

    def _add_running(self, draft: Draft, running: list[Sequence]) -> bool:
        """One token for every running sequence; whether memory was too short for all of them."""
        if draft.try_add_decodes(running):
            return False
        is_short = False
        for seq in running:
            while seq.state is State.RUNNING and not draft.try_add(seq, 1):
                is_short = True
                if self._pool.chunks.num_retiring or self.turns.is_moving:
                    # Enough may be free once the step or the copy in flight ends; what another victim gave
                    # up would not be free sooner. Until then this sequence and the later ones sit out.
                    return True
                self._make_way(draft, [one for one in running if one.state is State.RUNNING])
        return is_short

    def _make_way(self, draft: Draft, running: list[Sequence]) -> None:
        """Take memory from a sequence that is not in the draft: those in it arrived earlier."""
        drafted = {id(seq) for seq, _, _ in draft.pieces}
        free = [seq for seq in running if id(seq) not in drafted and seq.may_be_parked]
        victim = self.turns.furthest_ahead(free, self._clock())
        if not victim or not self._try_park(victim, draft.num_missing(running), "park_for_growth"):
            self.preempt(self._active[-1])

    def _add_prefilling(self, draft: Draft) -> None:
        for seq in self._active:
            if seq.state is State.PREFILLING and self._pool.prefixes.is_readable(seq.held_slot, draft.number):
                self._add_piece(draft, seq)

    def _add_piece(self, draft: Draft, seq: Sequence) -> bool:
        """As many of the sequence's next tokens as fit; False if none does."""
        if seq.is_arriving:
            return True  # in time it will, and whoever comes next may go first
        limit = self._config.prefill_piece_tokens or self._config.largest_step
        count = min(seq.num_tokens - seq.num_computed, draft.tokens_left, limit)
        while count > 0 and not draft.try_add(seq, count):
            count //= 2
        return count > 0

    def _admit(self, draft: Draft, running: list[Sequence], now_s: float) -> None:
        """Start waiting requests while the whole of what they know fits beside the draft."""
        while self.waiting and self.free_seats and self._pool.num_free_slots and draft.tokens_left > 0:
            candidate = self._admission.next(self.waiting, self._active, draft)
            if candidate is None:
                return
            seq, match = candidate
            if not self._try_open(seq, match, draft):
                if self._num_lacking > 0 and self.turns.nobody_yields:
                    self.staging.try_add(seq, match, draft, self.free_seats[-1], running, now_s)
                return
            if not self._add_piece(draft, seq):
                return

    def _try_open(self, seq: Sequence, match: Match | None, draft: Draft) -> bool:
        """Give a waiting sequence a slot, if memory allows and nothing better is coming."""
        if self._admission.must_wait(seq, match, draft):
            return False
        lacking = self._admission.num_lacking(seq, match, self._active, draft)
        if lacking > 0:
            self._num_lacking = lacking
            return False
        opened = self._pool.open_slot(match, seq.chain, seq.num_tokens)
        if opened is None:
            return False
        if self.waiting.head is not seq:
            self.waiting.head.num_overtaken += 1
        self.waiting.started(seq)
        seq.open(self.fetching.begin(seq, opened), self.free_seats.pop())
        seq.move(State.PREFILLING)
        insort(self._active, seq, key=_age)
        if self._pool.prefixes.is_enabled and not seq.num_preemptions:
            self.prefix_queries += seq.num_tokens
            self.prefix_hits += seq.num_found
        return True

    def _append(self, seq: Sequence, token: int, logprobs: TokenLogprobs | None) -> TokenDelta:
        if not seq.output_token_ids:
            self.prompt_tokens += len(seq.prompt_token_ids)
            seq.first_token_s = now_s = self._clock()
            self.turns.promises.first_token(seq, now_s)
        seq.output_token_ids.append(token)
        self.generated_tokens += 1
        reason = seq.ending(self._eos, self._max_model_len)
        if reason:
            self._remove(seq, reason)
            self.finished[reason] += 1
        elif seq.slot is not None and seq.num_known % self._pool.kv.geometry.tokens_per_chunk == 1:
            self._pool.hash(seq.chain, seq.tokens, seq.num_known - 1)
            self._pool.prefixes.known(seq.slot, seq.chain)
        entries = (logprobs,) if logprobs else ()
        return TokenDelta(
            seq.request_id, (token,), entries, reason, None, seq.num_preemptions, seq.num_cached_tokens
        )

    def _is_unsettled(self) -> bool:
        """Whether a step or a copy in flight will end sequences, free chunks or bring a sequence back."""
        is_busy = self._pool.chunks.num_retiring > 0 or self.turns.is_unsettled
        return is_busy or any(seq.num_in_flight for seq in self._active)

    def _remove(self, seq: Sequence, reason: FinishReason) -> None:
        if seq.state is State.WAITING:
            self.waiting.remove(seq)
        else:
            (self._release_parked if seq.state is State.PARKED else self._release)(seq, reason != "error")
        if reason in ("stop", "length"):
            self.turns.finished(seq, self._clock(), stopped=reason == "stop")
        seq.move(State.FINISHED)
        del self._by_id[seq.request_id]

    def preempt(self, seq: Sequence) -> None:
        """Take a sequence's KV, which is kept until somebody needs the memory. It waits again."""
        (self._release_parked if seq.state is State.PARKED else self._release)(seq)
        seq.move(State.WAITING)
        seq.num_preemptions += 1
        self.num_preemptions += 1
        self.turns.decisions["recompute"] += 1
        self.waiting.add(seq)

    def _release(self, seq: Sequence, is_sound: bool = True) -> None:
        """Take a sequence's slot. What it computed stays there, unless that may be what made it fail."""
        slot, prefixes, num_kept = seq.held_slot, self._pool.prefixes, seq.num_known_computed
        for reader in prefixes.orphans(slot, num_kept):
            self.preempt(next(one for one in self._active if one.slot == reader))
        if not prefixes.is_readable(slot, NO_DRAFT):
            num_kept = 0  # an orphan: what it was to read will not be computed
        elif not is_sound:
            num_kept = min(num_kept, prefixes.distrust(slot))
        if seq.copy is not None:  # not made: the block it was for holds nothing
            num_kept -= num_kept % self._pool.kv.geometry.tokens_per_chunk
        self._active.remove(seq)
        self._pool.hash(seq.chain, seq.tokens, num_kept)
        self.turns.discard(seq, num_kept)
        self._pool.close_slot(slot, seq.chain, seq.tokens(0, num_kept))
        self.free_seats.append(seq.seat)
        seq.leave()

    def _release_parked(self, seq: Sequence, is_sound: bool = True) -> None:
        """The same of a parked one, and of the slot that it may have kept."""
        self._pool.hash(seq.chain, seq.tokens, seq.num_known_computed)
        slot, num_there = self.turns.discard(seq, seq.num_known_computed if is_sound else 0)
        if slot is not None:
            self._pool.close_slot(slot, seq.chain, seq.tokens(0, num_there))
        self.free_seats.append(seq.seat)
        seq.leave()


def _age(seq: Sequence) -> tuple[float, str]:
    return seq.arrival_s, seq.request_id
