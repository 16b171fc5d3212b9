"""Many steps of a batch at once, for engines in virtual time: those in which nothing is decided.

While all that an engine holds are sequences that decode, and there is memory for them, one step is like the
next: each sequence gains a token. Such steps need not be drafted one by one. A leap ends before a sequence
would end, before a time that the caller names, and where memory gets short; whatever else happens is done by
ordinary steps. Tokens, times, memory and what the engine learns are those of the steps that were leapt over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.calibration import StepSeconds
from engine.core import Engine
from engine.messages import EngineSnapshot, TokenDelta
from engine.scheduler import Scheduler
from engine.sequence import State
from engine.simulated import VirtualClock
from engine.step_times import StepWork

_CALM = (
    0.7  # of the pool, needed by somebody: from 0.75 on sequences are copied to the balloon ahead (`turns`)
)
_SHORTEST = 3  # steps: fewer are drafted as soon as leapt over
_SETTLE_S = 0.05  # the balloon grows by a slab, which takes longer, whenever it is looked at


class LeapingScheduler(Scheduler):
    """Can tell how many steps are alike, and do the books of them together."""

    def num_alike(self) -> int:
        """Steps from here in which each sequence gains a token and nothing else is to be done; 0 if there are
        none.
        """
        active, turns, chunks = self._active, self.turns, self._pool.chunks
        if not active or self.waiting or turns.parked or turns.is_moving:
            return 0
        if any(seq.state is not State.RUNNING or seq.copy is not None for seq in active):
            return 0
        if chunks.total - chunks.num_free - self._pool.num_evictable > _CALM * chunks.total:
            return 0
        return max(0, min(seq.longest(self._max_model_len) - seq.num_tokens for seq in active) - 1)

    def num_contexts(self) -> tuple[int, int]:
        """Sequences that decode, and the tokens that they read in the next step."""
        return len(self._active), sum([seq.num_computed for seq in self._active])

    def reserve_ahead(self, count: int) -> bool:
        """Back what all sequences grow into within so many steps, or nothing."""
        growth = [(seq.held_slot, seq.num_computed + count) for seq in self._active]
        return self._pool.reserve(growth, len(growth), len(growth))

    def leapt(self, begins: Sequence[float]) -> list[TokenDelta]:
        """Steps that began then have been done; what each sequence has gained."""
        active, prefixes, count = self._active, self._pool.prefixes, len(begins)
        per_block = self._pool.kv.geometry.tokens_per_chunk
        for begin_s in begins:
            self.turns.tick(begin_s, active, has_prompts=False, first_token_late=False)
        for seq in active:
            before = seq.num_computed // per_block
            seq.output_token_ids += [seq.output_token_ids[-1]] * count
            seq.num_computed += count
            seq.num_written = seq.num_computed
            if seq.num_computed // per_block > before:
                prefixes.computed(seq.held_slot, seq.num_computed)
                self._pool.hash(seq.chain, seq.tokens, seq.num_known - 1)
                prefixes.known(seq.held_slot, seq.chain)
        self._num_steps += count
        self._pool.launched(self._num_steps)
        self._pool.finished(self._num_steps)
        self.generated_tokens += count * len(active)
        return [TokenDelta(seq.request_id, tuple(seq.output_token_ids[-count:])) for seq in active]


class LeapingEngine(Engine):
    """An engine of which many steps can be taken at once, and whose snapshot is taken when somebody asks.

    Attributes:
        gap_s: between two tokens of a leap, while they are published; None otherwise.

    Args:
        steps: how long they take.
        parts, more: of `Engine`; its scheduler is a `LeapingScheduler`, its clock a `VirtualClock`.
    """

    def __init__(self, steps: StepSeconds, *parts: Any, **more: Any) -> None:
        self._is_lazy = self._is_stale = False
        super().__init__(*parts, **more)
        self._steps = steps
        self._is_lazy = True
        self.gap_s: float | None = None

    def renewed(self) -> EngineSnapshot:
        """The state of this moment."""
        if self._is_stale:
            self._is_stale = False
            super()._renew_snapshot()
        return self.snapshot

    @property
    def is_at_rest(self) -> bool:
        """Whether a step would change nothing: no requests, orders, copies or slabs are on their way."""
        if (
            self._inbox
            or self._in_flight
            or self._scheduler.unfinished()
            or self._scheduler.turns.is_unsettled
        ):
            return False
        if (parking := self._pool.parking) is None:
            return True
        balloon = parking.balloon
        is_going = balloon.is_shrinking or balloon.num_held > balloon.num_physical
        return not (balloon.is_growing or is_going or parking.is_copying)

    def calm_until(self) -> float:
        """A time before which nothing happens but tokens, if nobody comes; now, if that cannot be told."""
        count = 0 if self._inbox else self._leaping.num_alike()
        if count < _SHORTEST:
            return self._clock()
        return self._clock() + count * self._steps.step_s(self._next_work())

    def leap(self, until_s: float) -> int:
        """Take the steps that begin before then, if they are all alike; how many it were."""
        scheduler, clock = self._leaping, self._virtual_clock
        most = 0 if self._inbox or self._outlet.num_deposited else scheduler.num_alike()
        if most < _SHORTEST or clock() + (_SHORTEST - 1) * self._steps.step_s(self._next_work()) >= until_s:
            return 0
        self._complete_all(but=0)
        begins, at_s, work, step_s = list[float](), clock(), self._next_work(), 0.0
        while len(begins) < most and at_s < until_s:
            begins.append(at_s)
            step_s = self._steps.step_s(work)
            at_s += step_s
            work = work._replace(context=work.context + work.decodes)
        if not begins or not scheduler.reserve_ahead(len(begins)):
            return 0
        scheduler.queue_time.step(begins[0], 0, 0)
        self._pass_time(begins[0], at_s)
        scheduler.step_times.observe(work, step_s)
        deltas = scheduler.leapt(begins)
        self._done_s = self._last_busy_s = at_s
        self._last_step_s = step_s
        self._num_steps += len(begins)
        self.gap_s = step_s
        self._outlet.put([(delta, 0.0) for delta in deltas], holds_back=False)
        self.gap_s = None
        self._renew_snapshot()
        return len(begins)

    def launch_ahead(self) -> None:
        """Launch the step after a leap, which would be under way: who comes now waits for it too."""
        if self.steps_ahead and not self._in_flight:
            self.step()

    def _pass_time(self, begin_s: float, end_s: float) -> None:
        """Let the balloon grow meanwhile, as it does step by step."""
        at_s = begin_s
        while at_s < end_s:
            at_s = min(end_s, at_s + _SETTLE_S)
            self._virtual_clock.advance_to(at_s)
            self._scheduler.turns.settle()

    def _next_work(self) -> StepWork:
        decodes, context = self._leaping.num_contexts()
        return StepWork(0, decodes, context, 0.0)

    @property
    def _leaping(self) -> LeapingScheduler:
        assert isinstance(self._scheduler, LeapingScheduler)
        return self._scheduler

    @property
    def _virtual_clock(self) -> VirtualClock:
        assert isinstance(self._clock, VirtualClock)
        return self._clock

    def _renew_snapshot(self) -> None:
        if self._is_lazy:
            self._is_stale = True
        else:
            super()._renew_snapshot()
