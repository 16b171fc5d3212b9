"""Prompts for which there is no room: computed in one piece, each layer's KV leaving for the balloon at once.

LayerKV (section 3.1) starts a waiting prompt as soon as there is room for a few of its layers. Its first
token comes in time then, and the sequence waits in the balloon for its turn. Giving it the place of a
sequence that is ahead of its client is better where that can be: pieces of a prompt beside decodes cost less
than all of it at once. So this is for prompts that nobody can make room for.
"""

from __future__ import annotations

from engine.config import SchedulerConfig
from engine.draft import Draft
from engine.memory.blocks import Match
from engine.memory.layer_wise import Offload
from engine.memory.pool import MemoryPool
from engine.sequence import Sequence, State
from engine.step_times import StepTimes, StepWork
from engine.turns import Turns
from engine.waiting import WaitingLine

_KEPT_S = 10.0  # the staging slot is mapped for so long after its last prompt: mapping takes 59 us a chunk


class Staging:
    """The prompt that the step being drafted computes layer-wise, if it computes one.

    Args:
        config: `layer_wise`, `policy` and the size of steps.
        pool: the one door to memory.
        times: of steps.
        turns, waiting: told of a prompt that does not wait any more, and is parked.
    """

    def __init__(
        self, config: SchedulerConfig, pool: MemoryPool, times: StepTimes, turns: Turns, waiting: WaitingLine
    ) -> None:
        self._config = config
        self._pool = pool
        self._times = times
        self._turns = turns
        self._waiting = waiting
        self._seq: Sequence | None = None
        self._used_s = 0.0
        self.offload: Offload | None = None

    def begin_draft(self, now_s: float) -> None:
        """What the draft before held was launched, or will not be."""
        layer_wise = self._pool.layer_wise
        if layer_wise is None:
            return
        if self.offload is not None:
            layer_wise.cancel(self.offload)
        self._seq = self.offload = None
        if self._used_s and now_s - self._used_s > _KEPT_S:
            layer_wise.release()
            self._used_s = 0.0

    def try_add(
        self,
        seq: Sequence,
        match: Match | None,
        draft: Draft,
        seat: int,
        running: list[Sequence],
        now_s: float,
    ) -> bool:
        """Let a waiting prompt be computed by this step, if the balloon has room for it.

        Args:
            seat: that it will have.
            running: sequences that decode, whose next tokens wait for the step.
        """
        layer_wise, count = self._pool.layer_wise, seq.num_tokens
        if layer_wise is None or not self._config.layer_wise or self.offload is not None:
            return False
        is_new = not seq.num_preemptions and (match is None or not match.num_tokens)
        most = self._config.max_num_batched_tokens if running else self._config.largest_step
        if not is_new or draft.num_tokens + count > most:
            return False
        if layer_wise.num_missing(count) > draft.room(count):
            return False
        prefixes = self._pool.host_prefixes
        if prefixes is not None and prefixes.num_found(seq.chain, count, 0):
            return False
        if not self._is_bearable(count, running, now_s):
            return False
        self.offload = layer_wise.begin(seq.backing, count)
        if self.offload is None:
            return False
        self._seq, seq.seat, self._used_s = seq, seat, now_s
        draft.stage(seq, self.offload.slot)
        return True

    def launched(self) -> Sequence:
        """Its step has been launched: it is parked, and its first token is in flight."""
        seq, parking, offload = self._seq, self._pool.parking, self.offload
        if seq is None or parking is None or offload is None:
            raise ValueError("no prompt is staged")
        self._waiting.started(seq)
        parking.receive(seq.backing, offload.rows, offload)
        seq.num_computed = seq.num_tokens
        seq.num_in_flight += 1
        seq.is_new_to_slot = False
        seq.move(State.PARKED)
        self._turns.take_in(seq, "layer_wise")
        self._seq = self.offload = None
        return seq

    def _is_bearable(self, count: int, running: list[Sequence], now_s: float) -> bool:
        """Whether those that decode can wait for a prompt of that length."""
        if not running or self._config.policy == "fcfs" or not self._times.is_fitted:
            return True
        context = sum([one.num_computed for one in running])
        work = StepWork(count, len(running), context, count * count / 2)
        return self._times.predict(work) <= self._turns.bearable_s(running, now_s)
