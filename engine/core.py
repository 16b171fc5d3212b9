"""The engine: one loop that owns every sequence and all memory state.

    step = apply orders -> schedule -> reserve -> run -> sample -> commit -> publish

On a GPU the first five are done for one step while the device still computes the step before, whose
tokens are then committed: the device always has work waiting, and the host's part costs no time. What a
step needs of the tokens not read yet, it finds on the device.

`submit` and `cancel` may be called from any thread: they leave a note that the next step reads
first. Nothing else writes to sequences, slots or chunks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from engine.config import EngineConfig
from engine.control import Order, OrderAnswer
from engine.errors import EngineDeadError, OverloadedError, RequestError
from engine.memory.blocks import TokenChain
from engine.memory.pool import MemoryPool
from engine.messages import (
    EngineInfo,
    EngineSnapshot,
    FinishReason,
    GenerateRequest,
    StepPlan,
    TokenDelta,
)
from engine.migrations import Migrations
from engine.model.sampler import Sampled
from engine.orders import Command, Orders, T
from engine.outlet import Entry, Outlet, Publish
from engine.parts import OutsideMemory, PendingTokens, Runner, TokenSampler, sample_row
from engine.requests import check_in_time, check_request
from engine.scheduler import Scheduler
from engine.sequence import Sequence as EngineSequence
from engine.sequence import new_sequence
from engine.snapshots import take_snapshot
from engine.step_times import StepWork

logger = logging.getLogger(__name__)

_MAP_TRIES = 3


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step in flight.

    Attributes:
        sequences: those it chooses a token for, in the order of `tokens`.
    """

    step: int
    sequences: list[EngineSequence]
    tokens: PendingTokens
    work: StepWork
    launched_s: float


class Engine:
    """One model on one device.

    Args:
        config: limits and the model's name.
        info: facts of the loaded model.
        pool, scheduler, runner, sampler: the parts, already wired to one another.
        publish: receives every delta, in the engine's thread; must be quick.
        clock: seconds that never go back.
        steps_ahead: steps to launch before the tokens of a running one have been read: 1 keeps a GPU
            busy; 0 where the host computes the step itself.
        outside: knows what of the device's memory is not the pool's.
    """

    def __init__(  # noqa: PLR0913 - the parts of an engine, made elsewhere
        self,
        config: EngineConfig,
        info: EngineInfo,
        pool: MemoryPool,
        scheduler: Scheduler,
        runner: Runner,
        sampler: TokenSampler,
        publish: Publish,
        clock: Callable[[], float] = time.monotonic,
        steps_ahead: int = 0,
        outside: OutsideMemory | None = None,
    ) -> None:
        self.info = info
        self._config = config
        self._pool = pool
        self._scheduler = scheduler
        self._runner = runner
        self._sampler = sampler
        self._outlet = Outlet(publish, clock)
        self._clock = clock
        self.steps_ahead = steps_ahead
        self._in_flight: deque[_Launched] = deque()
        self._done_s = clock()  # when the newest step was read
        self._outside = outside
        self._orders = Orders(config.scheduler, pool, scheduler.turns, clock)
        self._inbox: deque[GenerateRequest | str | Command[Any]] = deque()
        self._wake = threading.Event()
        self._door = threading.Lock()  # nobody may slip in while the loop says goodbye to the rest
        self._open: set[str] = set()  # submitted and not ended; both threads change it, behind the door
        self.migrations = Migrations(
            config, info, pool, scheduler, self._outlet, self._open, self._door, clock
        )
        self._num_steps = 0
        self._last_step_s = 0.0
        self._last_busy_s: float | None = clock()  # None once idle memory has been given back
        self._death: BaseException | None = None
        self.snapshot: EngineSnapshot
        self._renew_snapshot()

    def submit(self, request: GenerateRequest) -> None:
        """Queue a request. Its deltas go to `publish`; the last one carries a finish reason.

        Raises:
            RequestError: it cannot be served as asked; nothing has been queued.
            OverloadedError: the queue is full, or the first token would come too late.
            EngineDeadError: the loop has ended.
        """
        check_request(request, self.info)
        with self._door:
            self.check_alive()
            limits = self._config.scheduler
            if len(self._open) >= limits.max_num_seqs + limits.max_num_queued_reqs:
                self._scheduler.turns.decisions["refuse"] += 1
                raise OverloadedError(
                    f"{limits.max_num_seqs} requests run and {limits.max_num_queued_reqs} wait, which is all "
                    f"that {self.info.model_id} takes",
                    max(1.0, self._outlet.request_s),
                )
            self._check_in_time(request)
            if request.request_id in self._open:
                raise RequestError(f"a request with the id {request.request_id!r} is still open")
            self._open.add(request.request_id)
            self._inbox.append(request)
        self._wake.set()

    def _check_in_time(self, request: GenerateRequest) -> None:
        """Raise OverloadedError if the first token would come too late, where that is not served."""
        if self._config.scheduler.on_overload == "shed":
            queued = [order for order in list(self._inbox) if isinstance(order, GenerateRequest)]
            tokens = sum(len(one.prompt_token_ids) for one in (*queued, request))
            try:
                check_in_time(request, self._config.slo, self._scheduler.queue_time.first_token_s(tokens))
            except OverloadedError:
                self._scheduler.turns.decisions["shed"] += 1
                raise

    def cancel(self, request_id: str) -> None:
        """End a request at the top of the next step. Unknown ids are ignored: it may just have ended."""
        self._inbox.append(request_id)
        self._wake.set()

    def trim(self, drop_cache: bool = False) -> Future[int]:
        """Give free memory back to the device at the top of the next step; the bytes it was.

        Args:
            drop_cache: KV that no sequence reads is given up first.

        The future is cancelled if the loop ends before.
        """
        return self.between_steps(lambda: self._give_back(drop_cache))

    def apply(self, order: Order) -> Future[OrderAnswer]:
        """Follow the controller's order at the top of the next step; cancelled as for `trim`."""
        return self.between_steps(lambda: self._orders.apply(order))

    def between_steps(self, run: Callable[[], T]) -> Future[T]:
        """Have something done at the top of the next step; cancelled as for `trim`."""
        command = Command(run)
        with self._door:
            self.check_alive()
            self._inbox.append(command)
        self._wake.set()
        return command.result

    def check_alive(self) -> None:
        """Raise EngineDeadError, with the cause, once the loop has ended."""
        if self._death is not None:
            raise EngineDeadError(f"the engine of {self.info.model_id} has stopped: {self._death}")

    def run_until(self, stop: threading.Event) -> None:
        """The loop: steps while there is work, sleeps while there is none.

        An error that is not one request's ends the loop, as `stop` does: every open request is told,
        and `check_alive` raises from then on.
        """
        reason: BaseException = EngineDeadError("it was shut down")
        try:
            self._pool.chunks.vm.enter()
            while not stop.is_set():
                if not self.step():
                    self._pool.check()
                    self._trim_if_idle_for_long()
                    self._wake.wait(timeout=0.5)
                self._wake.clear()
        except Exception as error:
            logger.exception("engine loop ended")
            reason = error
        with self._door:
            self._death = reason
            lost = [seq.request_id for seq in self._scheduler.unfinished()]
            while self._inbox:  # not iterated over: `cancel` adds to it without the door
                order = self._inbox.popleft()
                if isinstance(order, GenerateRequest):
                    lost.append(order.request_id)
                elif isinstance(order, Command):
                    order.result.cancel()
        self._outlet.end([_failed(request_id, f"the engine stopped: {reason}") for request_id in lost])

    def step(self) -> bool:
        """One turn: launch the next step, then read and commit those before it; False if idle."""
        started = self._clock()
        busy = self._apply_orders()
        self._pool.limit.begin_step()
        plan = self._schedule_and_reserve()
        if plan is not None:
            self._launch(plan)
            ahead, limits = self._config.memory.map_ahead_tokens, self._config.scheduler
            if ahead:
                self._pool.ahead.grow(self._scheduler.upcoming(ahead), limits.max_num_batched_tokens)
        elif not self._in_flight:
            busy |= self._scheduler.turns.wait()  # nothing can be computed until a copy has ended
            self._publish_all([])
            self._renew_snapshot()
            return busy
        self._complete_all(but=self.steps_ahead if plan is not None else 0)
        self._last_busy_s = self._clock()
        self._last_step_s = self._last_busy_s - started
        self._renew_snapshot()
        return True

    def _trim_if_idle_for_long(self) -> None:
        limit, since = self._config.memory.trim_after_s, self._last_busy_s
        if limit is not None and since is not None and self._clock() - since >= limit:
            self._last_busy_s = None
            self._give_back(drops_cache=False)
            self._renew_snapshot()

    def _give_back(self, drops_cache: bool) -> int:
        freed = self._pool.trim(drops_cache)
        if self._outside is not None:
            self._outside.release_unused()
        logger.info("gave %.1f MiB back to the device", freed / 2**20)
        return freed

    def _apply_orders(self) -> bool:
        """Take in submitted and cancelled requests; whether there were any."""
        busy = bool(self._inbox)
        while self._inbox:
            order = self._inbox.popleft()
            if isinstance(order, GenerateRequest):
                chain = TokenChain(order.cache_salt, self._pool.kv.geometry.tokens_per_chunk)
                self._scheduler.add(new_sequence(order, self._clock(), chain, self._config.slo))
            elif isinstance(order, Command):
                order.execute(then=self._renew_snapshot)
            elif (seq := self._scheduler.get(order)) is not None:
                self._end(seq, "cancelled")
        return busy

    def _schedule_and_reserve(self) -> StepPlan | None:
        """The next plan with everything it needs in place.

        The draft only counted chunks; the driver may still refuse. If it will not make a chunk the
        pool is smaller from now on, and the step is drafted again for what is left. If it will not map
        one, even when asked again, the newest sequence of the step fails, and only it; so does one that
        cannot go on alone, once the driver has been asked again for what it did not make.
        """
        has_asked, num_refused = False, 0
        while True:
            scheduled = self._scheduler.schedule()
            if scheduled is None:
                if not self._is_stuck():
                    return None
                if not has_asked and self._pool.chunks.num_refused:
                    has_asked = True
                    self._pool.chunks.ask_again()
                    continue
                oldest = min(self._scheduler.unfinished(), key=lambda seq: (seq.arrival_s, seq.request_id))
                self._fail(oldest, "the memory pool cannot hold this sequence")
                continue
            plan, growth = scheduled
            total = self._pool.chunks.total
            if self._pool.reserve(growth, plan.num_tokens, plan.num_rows, plan.staged_tokens):
                self._pool.launched(plan.step)
                return plan
            if self._in_flight:
                self._complete_all(but=0)  # what they read is counted as room, and can be had once they end
            elif self._pool.chunks.total == total:
                num_refused += 1
                if num_refused % _MAP_TRIES == 0:
                    newest = self._scheduler.latest([piece.request_id for piece in plan.pieces])
                    self._fail(newest, "the device refused to map memory")

    def _is_stuck(self) -> bool:
        """Whether somebody waits although nothing runs, and nobody else gives, what they need."""
        if self._in_flight or self.migrations.num_leaving or self._pool.limit.lacks_its_own:
            return False
        waits = bool(self._scheduler.unfinished()) and self._pool.chunks.num_retiring == 0
        return waits and not self._scheduler.turns.is_unsettled

    def _launch(self, plan: StepPlan) -> None:
        """Start computing and sampling a reserved plan."""
        sequences = [self._scheduler.get(piece.request_id) for piece in plan.pieces if piece.samples]
        rows = [sample_row(seq) for seq in sequences if seq is not None]
        try:
            logits = self._runner.run(plan, self._scheduler.staging.offload)
            tokens = self._sampler.launch(logits, rows)
        except torch.OutOfMemoryError as error:
            self._give_up(plan, error)
            return
        work = StepWork.of(plan)
        sampling = self._scheduler.launched(plan, work)
        self._in_flight.append(_Launched(plan.step, sampling, tokens, work, self._clock()))

    def _give_up(self, plan: StepPlan, error: Exception) -> None:
        """A step whose temporaries, outside the pool, did not fit: only the newest request pays.

        What the step wrote to KV is written again with the same values. What it may have left in the
        sampler is not: those sequences are told to it anew.
        """
        self._runner.synchronize()
        self._complete_all(but=0)
        self._pool.finished(plan.step)
        left = [seq for piece in plan.pieces if (seq := self._scheduler.get(piece.request_id)) is not None]
        for seq in left:
            seq.is_new_to_slot = True
        if left:
            newest = self._scheduler.latest([seq.request_id for seq in left])
            self._fail(newest, f"the device ran out of memory: {error}")

    def _complete_all(self, but: int) -> None:
        """Wait for steps in flight and commit them, the oldest first, until `but` are left."""
        while len(self._in_flight) > but:
            launched = self._in_flight.popleft()
            results = launched.tokens.wait()
            now_s = self._clock()
            self._scheduler.observe(launched.work, now_s - max(launched.launched_s, self._done_s))
            self._done_s = now_s
            self._runner.finished(launched.step)
            self._pool.finished(launched.step)
            self._num_steps += 1
            self._commit(launched.sequences, results)

    def _commit(self, sequences: Sequence[EngineSequence], results: Sequence[Sampled]) -> None:
        deltas, holds_back = [], self._scheduler.takes_turns
        for seq, one in zip(sequences, results, strict=True):
            if one.error is None:
                delta = self._scheduler.commit(seq, one.token_id, one.logprobs)
                if delta is not None:
                    is_paced = holds_back and not seq.request.unpaced
                    deltas.append((delta, seq.due_s if is_paced else 0.0))
            elif self._scheduler.get(seq.request_id) is seq:
                self._fail(seq, one.error)
        self._publish_all(deltas)

    def _fail(self, seq: EngineSequence, message: str) -> None:
        logger.warning("request %s failed: %s", seq.request_id, message)
        self._end(seq, "error", message)

    def _end(self, seq: EngineSequence, reason: FinishReason, message: str | None = None) -> None:
        self._publish_all([(self._scheduler.finish(seq, reason, message), 0.0)])

    def _publish_all(self, entries: list[Entry]) -> None:
        """Hand deltas out, each with the time it was promised for, or hold them back till then."""
        ended = [delta.request_id for delta, _ in entries if delta.finish_reason is not None]
        if ended:
            with self._door:
                self._open.difference_update(ended)
        self._outlet.put(entries, self._config.scheduler.deposit and self._scheduler.takes_turns)

    def _renew_snapshot(self) -> None:
        memory, scheduler = self._pool.snapshot(), self._scheduler
        if self._outside is not None:
            memory = self._outside.describe(memory)
        steps, held = (self._num_steps, self._last_step_s), self._outlet.num_deposited
        self.snapshot = take_snapshot(self.info, scheduler, memory, self._clock(), *steps, held, self._orders)


def _failed(request_id: str, message: str) -> TokenDelta:
    return TokenDelta(request_id, (), finish_reason="error", error=message)
