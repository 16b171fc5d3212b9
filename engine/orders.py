"""What the controller has ordered, and what of it is so. Nobody else moves these levers.

Who owns which fact: the controller the balloon's logical and physical size, the limit of the pool on a
shared device, the retention and the admission weight, which hold until it orders others, also while it is
away. The engine's own feedback owns a share of that, from 1 down to a floor: it takes room within the logical
size, and part of a step within the admission weight, and never more than either. An order leaves the
feedback's share as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Generic, TypeVar

from engine.config import SchedulerConfig
from engine.control import Order, OrderAnswer, OrderOutcome
from engine.memory.pool import MemoryPool
from engine.sequence import Sequence
from engine.turns import Turns

T = TypeVar("T")

_FLOOR_S = 0.1  # between two looks at every open request


class Command(Generic[T]):
    """Something that others want done in the engine's thread, between two steps."""

    def __init__(self, run: Callable[[], T]) -> None:
        self._run = run
        self.result: Future[T] = Future()

    def execute(self, then: Callable[[], None]) -> None:
        """Do it, and `then` before anybody hears of it; neither if nobody waits for it any more."""
        if self.result.set_running_or_notify_cancel():
            result = self._run()
            then()
            self.result.set_result(result)


class Orders:
    """Follows the controller. Called in the engine's thread, between two steps.

    Attributes:
        last: the order that is obeyed; None before the first.
    """

    def __init__(
        self, config: SchedulerConfig, pool: MemoryPool, turns: Turns, clock: Callable[[], float]
    ) -> None:
        self._min_retained = config.min_retained_chunks
        self._pool = pool
        self._turns = turns
        self._clock = clock
        self.last: Order | None = None
        self._since_s = 0.0
        self._floor, self._floor_s = 0, -math.inf

    @property
    def age_s(self) -> float:
        """Seconds since the last order came; 0 if there was none."""
        return self._clock() - self._since_s if self.last is not None else 0.0

    def apply(self, order: Order) -> OrderAnswer:
        """Pull the levers, unless a later order is obeyed. The same order again is answered anew."""
        if self.last is not None and order != self.last:
            number, obeyed = (order.epoch, order.revision), (self.last.epoch, self.last.revision)
            if number < obeyed:
                return self._answer("stale")
            if number == obeyed:
                return self._answer("conflict")
        if self._pool.parking is None and order.balloon_logical_bytes > 0:
            return self._answer("conflict")  # there is no balloon, by configuration
        if order.pool_bytes is not None and not self._pool.limit.is_elastic:
            return self._answer("conflict")
        if order != self.last:
            self.last, self._since_s = order, self._clock()
            self._pull(order)
        host, device = self._overage_bytes(order), self._pool.limit.overage_bytes
        return self._answer("deferred" if host or device else "applied", host, device)

    def floor(self, requests: Iterable[Sequence], max_model_len: int) -> int:
        """Chunks below which the pool's limit should not be: what the longest of these needs, alone."""
        if self._clock() - self._floor_s >= _FLOOR_S:
            longest = max((seq.longest(max_model_len) for seq in requests), default=1)
            self._floor, self._floor_s = self._pool.chunks_for(longest), self._clock()
        return self._floor

    def _pull(self, order: Order) -> None:
        self._turns.min_retained_chunks = int(self._min_retained * order.retention)
        self._turns.admission_weight = order.admission_weight
        self._pool.limit.restrict(order.pool_bytes)
        if (parking := self._pool.parking) is not None:
            chunk_bytes = parking.balloon.chunk_bytes
            parking.balloon.set_physical(order.balloon_physical_bytes // chunk_bytes)
            parking.balloon.set_logical(order.balloon_logical_bytes // chunk_bytes)
            parking.host.deflate()

    def _overage_bytes(self, order: Order) -> int:
        """Host memory that is held beyond the order."""
        if (parking := self._pool.parking) is None:
            return 0
        held = parking.balloon.num_held * parking.balloon.chunk_bytes
        return max(0, held - order.balloon_physical_bytes)

    def _answer(self, outcome: OrderOutcome, host_bytes: int = 0, device_bytes: int = 0) -> OrderAnswer:
        epoch, revision = (self.last.epoch, self.last.revision) if self.last is not None else (-1, -1)
        return OrderAnswer(outcome, epoch, revision, host_bytes, device_bytes)
