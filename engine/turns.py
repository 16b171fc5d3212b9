"""Who is on the device and who waits in the balloon, so that first and next tokens keep their deadlines.

Sequences take turns. One that is ahead of its client can wait for a while; it is parked when a waiting
prompt lacks memory, or when another that is parked is further behind. What counts is the *runway*: the
time until the client, at the pace it was promised, has had everything that was generated for it. Prompts
are let in at the cost of running sequences as long as these can still keep their mean time per token:
LayerKV's bound (section 3.1, Eq. 1), with what finished requests have generated as the forecast.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Sequences

from engine.answer_lengths import AnswerLengths
from engine.config import SchedulerConfig
from engine.feedback import Feedback
from engine.governor import Governor
from engine.memory.parking import Parking
from engine.memory.pool import MemoryPool
from engine.promises import Promises
from engine.sequence import Sequence, State

_CROWDED = 0.75  # of the pool, needed by somebody: with less, nobody will be parked soon
_FULL = 0.8  # of the balloon
_AT_STAKE_S = 2.0  # of slack
_LONGEST_PAUSE_S = 5.0
_ROWS_TO_GROW = 2  # of each sequence, or a hundredth of the pool if that is less
_LATE = 0.05  # of all sequences: more that cannot keep their mean time per token are a breach
_SMOOTHING = 0.02  # of the time between two steps: a burst of prompts is no pace to reckon with


class Turns:
    """Parks sequences and brings them back. Owns those that are parked.

    Attributes:
        num_parked_late: parked sequences that cannot keep their mean time per token, by the last look.
        nobody_yields: a request waits for memory, and by the last look nobody could leave for it.
        decisions: how often each was made.
        min_retained_chunks, admission_weight: levers of `engine.orders`.
        promises: those kept and not kept so far.

    Args:
        config: `policy`, `turn_tokens`, `min_retained_chunks` and those of `Feedback`.
        pool: the one door to memory.
    """

    def __init__(self, config: SchedulerConfig, pool: MemoryPool) -> None:
        self._takes_turns = config.policy == "slo"
        self._turn_tokens = config.turn_tokens
        self.min_retained_chunks = config.min_retained_chunks
        self.admission_weight = 1.0
        self.promises = Promises()
        self._pool = pool
        self._parked: list[Sequence] = []
        self._returning: Sequence | None = None
        self._lengths = AnswerLengths()
        self._step_s = 0.0
        self._last_s: float | None = None
        self._last_step_s = 0.0
        self._in_flight_s = math.inf
        self._feedback = Feedback(config)
        self._governor = Governor()
        self.nobody_yields = False
        self.num_parked_late = 0
        self.decisions: Counter[str] = Counter()

    @property
    def parked(self) -> Sequences[Sequence]:
        """Sequences off the device, those on their way back included."""
        return self._parked

    @property
    def is_moving(self) -> bool:
        """Whether a copy will change what there is room for, or who can compute."""
        parking = self._pool.parking
        if parking is None or self._pool.host_prefixes is None:
            return False
        return self._returning is not None or parking.is_moving or self._pool.host_prefixes.is_fetching

    @property
    def is_unsettled(self) -> bool:
        """The same, or whether blocks that nobody reads are being saved: they cannot be given up meanwhile.
        Little enough for those that run not to wait for it, as they would again in every step.
        """
        prefixes = self._pool.host_prefixes
        return self.is_moving or (prefixes is not None and prefixes.is_saving)

    @property
    def _is_copying_out(self) -> bool:
        """Whether anything is on its way to the balloon."""
        parking, prefixes = self._pool.parking, self._pool.host_prefixes
        return bool((parking and parking.is_copying) or (prefixes and prefixes.is_saving))

    @property
    def _parking(self) -> Parking:
        """For what can only happen where there is a balloon."""
        if self._pool.parking is None:
            raise ValueError("there is no balloon to park sequences in")
        return self._pool.parking

    @property
    def num_allowed(self) -> int:
        """Chunks of the balloon that new prompts may send others to (eLLM's logical size)."""
        parking = self._pool.parking
        return int(parking.balloon.num_logical * self._feedback.share) if parking is not None else 0

    @property
    def prompt_share(self) -> float:
        """Of the largest step, for prompt tokens: two caps, of which the lower one counts."""
        return min(self._feedback.share, self.admission_weight)

    def tick(
        self, now_s: float, running: Sequences[Sequence], has_prompts: bool, first_token_late: bool
    ) -> None:
        """A step is being drafted.

        Args:
            running: sequences that decode.
            has_prompts: whether there are any to compute; without, and with nobody parked, nothing is to be
                decided.
            first_token_late: whether a request waits longer for its first token than it was promised.
        """
        if self._last_s is not None and running:
            self._last_step_s = now_s - self._last_s
            self._step_s += _SMOOTHING * (self._last_step_s - self._step_s)
        self._last_s = now_s
        if self._takes_turns and (has_prompts or self._parked):
            self.num_parked_late = sum([self.slack_s(seq, now_s) < 0 for seq in self._parked])
            late = self.num_parked_late + sum([self.slack_s(seq, now_s) < 0 for seq in running])
            is_breach = late > _LATE * (len(running) + len(self._parked))
            decision = self._feedback.step(is_breach, first_token_late)
            if decision is not None:
                self.decisions[decision] += 1

    def launched(self, predicted_s: float) -> None:
        """A step has been launched that will take so long, by prediction. The last one says nothing about it
        where a long prompt ends and the next begins: 0.57 s, then 0.11, which 0.28 of mapping held up (H200,
        8B model).
        """
        self._in_flight_s = predicted_s

    def settle(self) -> list[Sequence]:
        """Sequences that are on the device again or still, or that could not be brought back (`is_lost`)."""
        parking = self._pool.parking
        if parking is None:
            return []
        parking.settle()
        if self._pool.host_prefixes is not None:
            self._pool.host_prefixes.settle()
        if self._pool.passages is not None:
            self._pool.passages.settle()
        arrived = [seq for seq in self._parked if seq.backing.has_failed]
        if self._returning is not None and parking.is_back(self._returning.backing):
            arrived.append(self._returning)
            self._returning = None
        for seq in arrived:
            self._parked.remove(seq)
        return arrived

    def wait(self) -> bool:
        """Wait until a copy has ended; False if there is none."""
        parking = self._pool.parking
        if parking is None:
            return False
        if self._returning is not None:
            parking.wait_back(self._returning.backing)
            return True
        if parking.is_moving:
            parking.wait()
            return True
        return self._pool.host_prefixes is not None and self._pool.host_prefixes.wait()

    def park(self, seq: Sequence, num_chunks: int, why: str) -> bool:
        """Begin to move a running sequence off the device, so that so many chunks or more become free."""
        parking = self._pool.parking
        if parking is None:
            return False
        num_own = self._pool.kv.num_own_chunks(seq.held_slot)
        if num_own - num_chunks < self.min_retained_chunks:
            num_chunks = num_own
        if not parking.park(seq.backing, seq.held_slot, seq.num_computed, num_chunks):
            return False
        seq.move(State.PARKED)
        seq.slot = None
        self._parked.append(seq)
        self.decisions[why] += 1
        return True

    def take_in(self, seq: Sequence, why: str) -> None:
        """A sequence that is parked from the start: its prompt was computed layer-wise, or it comes from
        another engine.
        """
        self._parked.append(seq)
        self.decisions[why] += 1

    def take_back(self, seq: Sequence) -> int:
        """A sequence that `settle` named goes on; the slot it is in."""
        return self._parking.returned(seq.backing, seq.chain, seq.num_computed)

    def discard(self, seq: Sequence, num_kept: int) -> tuple[int | None, int]:
        """A sequence has ended, or will be computed again; of a parked one the slot to close, and the tokens
        whose KV is there.

        Args:
            num_kept: tokens whose KV others may find.
        """
        if seq in self._parked:
            self._parked.remove(seq)
        if self._returning is seq:
            self._returning = None
        if self._pool.passages is not None:
            self._pool.passages.lost(seq.backing)
        parking = self._pool.parking
        return (None, 0) if parking is None else parking.discard(seq.backing, seq.chain, num_kept)

    def write_through(self, running: Sequences[Sequence], now_s: float) -> None:
        """Copy KV that will soon leave the device to the balloon while the link has nothing else to do: of
        sequences that will be parked next, or else of blocks that will be given up next.
        """
        pool, parking, prefixes = self._pool, self._pool.parking, self._pool.host_prefixes
        if parking is None or prefixes is None or self._is_copying_out:
            return
        left = self._governor.num_bytes(self._last_step_s)
        needed = pool.chunks.total - pool.chunks.num_free - pool.num_evictable
        if self._takes_turns and needed >= _CROWDED * pool.chunks.total:
            self._save_running(parking, running, left, now_s)
        if not parking.is_copying and pool.chunks.num_spare < (1 - _CROWDED) * pool.chunks.total:
            prefixes.save(left)

    def _save_running(self, parking: Parking, running: Sequences[Sequence], left: int, now_s: float) -> None:
        for seq in sorted(running, key=self._order(now_s), reverse=True):
            left -= parking.save(seq.backing, seq.held_slot, seq.num_written, left)
            if left < parking.balloon.chunk_bytes:
                break

    def observe(self, slowness: float) -> None:
        """A step has taken so many times what was predicted of it."""
        if self._pool.parking is not None:
            self._governor.step(slowness, self._is_copying_out)

    def finished(self, seq: Sequence, now_s: float, stopped: bool) -> None:
        """A request was answered in full: the forecast learns from its length.

        Args:
            stopped: by itself, and not because it was to be no longer.
        """
        self.promises.ended(seq, now_s)
        self._lengths.ended(seq.num_outputs, stopped)

    def runway_s(self, seq: Sequence, now_s: float) -> float:
        """Seconds until the client of a sequence waits for the next token, at the pace it was promised."""
        return seq.due_s + (1 + seq.num_in_flight) * seq.tpot_slo_s - now_s

    def slack_s(self, seq: Sequence, now_s: float) -> float:
        """Seconds a sequence may lose and still keep its mean time per token, by forecast."""
        return self.runway_s(seq, now_s) + self._num_left(seq) * max(0.0, seq.tpot_slo_s - self._step_s)

    def victims(
        self, now_s: float, active: Sequences[Sequence], running: Sequences[Sequence], lacking: int
    ) -> list[tuple[Sequence, int, str]]:
        """Running sequences to park, the chunks each should free for others to compute, and why.

        Args:
            active: all that have a slot, prompts included.
            lacking: chunks that the next waiting request lacks; 0 if it does not wait for memory.
        """
        parking = self._pool.parking
        self.nobody_yields = lacking > 0
        if parking is None or not self._takes_turns:
            return []
        if lacking <= 0 and (self._returning is not None or parking.num_leaving or not self._parked):
            return []
        ahead = sorted([seq for seq in running if seq.may_be_parked], key=self._order(now_s), reverse=True)
        if lacking > 0:
            chosen = self._for_prompts(now_s, ahead, lacking - parking.num_leaving)
            self.nobody_yields = not chosen and not parking.num_leaving
            return chosen
        return [] if self._is_full else self._for_next(now_s, ahead, active)

    def bring_back(self, now_s: float, lacking: int, active: Sequences[Sequence]) -> None:
        """Let the parked sequence that is furthest behind come back, if there is room for it.

        A prompt that waits for memory goes first, unless the sequence's mean time per token is at stake.
        """
        if self._returning is not None or not self._parked:
            return
        seq = self._next(now_s)
        if seq is None or (lacking > 0 and self._takes_turns and self.slack_s(seq, now_s) > 0):
            return
        self._come_back(seq, self._reserve(active))

    def bring_back_any(self, now_s: float) -> bool:
        """Nothing else can go on: let any parked sequence come back that there is room for."""
        if self._returning is not None:
            return False
        order = sorted(self._staying, key=lambda seq: self.runway_s(seq, now_s))
        return any(self._come_back(seq, 0, is_alone=True) for seq in order)

    def _come_back(self, seq: Sequence, num_reserved: int, is_alone: bool = False) -> bool:
        step_s = math.inf if is_alone else min(self._last_step_s, self._in_flight_s)
        if not self._parking.bring_back(seq.backing, num_reserved, is_alone, step_s):
            return False
        self._returning = seq
        self.decisions["return"] += 1
        return True

    def furthest_ahead(self, running: Sequences[Sequence], now_s: float) -> Sequence | None:
        """The one of these that others may take the place of first."""
        return max(running, key=self._order(now_s), default=None)

    def bearable_s(self, running: Sequences[Sequence], now_s: float) -> float:
        """How long a step may be: endlessly, unless somebody's mean time per token is at stake by then."""
        slacks = sorted([self.slack_s(seq, now_s) for seq in running])
        if not slacks or slacks[len(slacks) // 20] > _AT_STAKE_S:
            return math.inf
        return min(seq.tpot_slo_s for seq in running)

    def _for_prompts(
        self, now_s: float, ahead: Sequences[Sequence], lacking: int
    ) -> list[tuple[Sequence, int, str]]:
        chosen: list[tuple[Sequence, int, str]] = []
        room = self.num_allowed - self._num_held
        for seq in ahead:
            size = self._pool.kv.num_own_chunks(seq.held_slot)
            if lacking <= 0 or room < size:
                break
            if self.slack_s(seq, now_s) > 0:
                chosen.append((seq, lacking, "park_for_prompt"))
                lacking -= size
                room -= size
        return chosen

    def _for_next(
        self, now_s: float, ahead: Sequences[Sequence], active: Sequences[Sequence]
    ) -> list[tuple[Sequence, int, str]]:
        """The one that is furthest ahead, if the parked one that is next is a whole turn behind it."""
        seq = self._next(now_s)
        if seq is None or not ahead:
            return []
        turn_s = self._turn_tokens * ahead[0].tpot_slo_s
        if self.runway_s(ahead[0], now_s) - self.runway_s(seq, now_s) < turn_s:
            return []
        lacking = self._parking.num_lacking(seq.backing, self._reserve(active))
        return [(ahead[0], lacking, "park_for_turn")] if lacking > 0 else []

    def _next(self, now_s: float) -> Sequence | None:
        settled = [seq for seq in self._staying if not seq.backing.is_leaving]
        return min(settled, key=self._order(now_s), default=None)

    @property
    def _staying(self) -> list[Sequence]:
        """Parked sequences but those that may be about to go on in another engine."""
        passages = self._pool.passages
        return [seq for seq in self._parked if passages is None or not passages.is_leaving(seq.backing)]

    @property
    def _is_full(self) -> bool:
        """Whether the balloon can hardly take more sequences: then some should end rather than all go on."""
        parking = self._pool.parking
        if parking is None:
            return False
        return self._num_held > _FULL * parking.balloon.num_logical

    @property
    def _num_held(self) -> int:
        """Host chunks that parked sequences have."""
        return sum([seq.backing.num_rows for seq in self._parked]) * self._pool.kv.geometry.num_groups

    def _order(self, now_s: float) -> Callable[[Sequence], tuple[int, float]]:
        """The key by which sequences should be on the device, the smallest first: those whose client waits
        soonest. With the balloon nearly full those whose client has waited for long, the longest first, then
        those whose client's mean time per token is at stake, then those that will end soonest, since what
        they hold lets others in.
        """
        if not self._is_full:
            return lambda seq: (0, self.runway_s(seq, now_s))

        def key(seq: Sequence) -> tuple[int, float]:
            runway_s = self.runway_s(seq, now_s)
            if runway_s < -_LONGEST_PAUSE_S:
                return 0, runway_s
            return 2 - (self.slack_s(seq, now_s) < _AT_STAKE_S), self._num_left(seq)

        return key

    def _reserve(self, active: Sequences[Sequence]) -> int:
        """Room to leave beside a sequence that comes back, for prompts that have begun and others to grow."""
        if not active:
            return 0
        kv = self._pool.kv
        prompts = [(seq.held_slot, seq.num_tokens) for seq in active if seq.state is State.PREFILLING]
        growth = min(_ROWS_TO_GROW * kv.geometry.num_groups * len(active), self._pool.chunks.total // 100)
        return kv.num_missing(prompts) + max(kv.geometry.num_groups, growth)

    def _num_left(self, seq: Sequence) -> float:
        """Tokens that a sequence is expected to generate yet."""
        return self._lengths.num_left(seq.num_outputs, seq.sampling.max_tokens - seq.num_outputs)
