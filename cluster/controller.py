"""The cluster's controller: looks at every group each tick, decides (`cluster.policy`), has it done.

No request passes through it, and its last orders hold while it is away. What it remembers it can read off
the groups, whose snapshots carry the order they obey: a new incarnation takes a higher epoch and leaves every
lever where it is. One that learns of a higher epoch than its own has been replaced, and ends.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ray.serve.handle import DeploymentHandle

from cluster.controller_metrics import ControllerMetrics
from cluster.metrics import RayBackend
from cluster.policy import PolicyConfig, State, decide, recovered
from cluster.reports import GroupReport, Instruction, InstructionAnswer
from cluster.served_model import answers_of
from engine.errors import BallonetError
from engine.messages import EngineSnapshot

_LOG_EVERY_S = 60.0
_log = logging.getLogger("ray.serve")


class Groups(Protocol):
    """All groups of one model."""

    def look(self) -> Awaitable[Sequence[GroupReport]]:
        """What each of them tells; of those that answer."""

    def instruct(self, instructions: Sequence[Instruction]) -> Awaitable[Sequence[InstructionAnswer]]:
        """Tell each what is wanted of it; what became of it, of those that answer."""


@dataclass(frozen=True, slots=True)
class ClusterView:
    """What one tick saw.

    Attributes:
        taken_s: Unix time; 0 before the first tick.
        groups: snapshots by model id; a model whose look failed is missing.
        epoch: of the controller; 0 before its first decision, or if it gives no orders.
        replicas: groups that each model should have.
    """

    taken_s: float
    groups: Mapping[str, tuple[EngineSnapshot, ...]]
    epoch: int = 0
    replicas: Mapping[str, int] | None = None


class Controller:
    """The loop around looks and decisions.

    Args:
        models: by model id.
        tick_s: pause between two ticks.
        metrics: where the controller's own metrics go.
        policy: constants of the decisions; None only looks.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        models: Mapping[str, Groups],
        tick_s: float,
        metrics: ControllerMetrics,
        policy: PolicyConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._models = models
        self._tick_s = tick_s
        self._metrics = metrics
        self._policy = policy
        self._clock = clock
        self._state: State | None = None
        self._obeyed: set[str] = set()  # groups that have followed this incarnation
        self._view = ClusterView(0.0, {})
        self._logged_s: dict[str, float] = {}
        self.is_replaced = False

    def latest(self) -> ClusterView:
        """What the newest tick saw."""
        return self._view

    async def run(self) -> None:
        """Ticks until cancelled, or until another controller has taken over."""
        while not self.is_replaced:
            await self.tick()
            await asyncio.sleep(self._tick_s)

    async def tick(self) -> None:
        """One look at all models, side by side, and what follows from it. Never raises."""
        started = time.monotonic()
        seen = await asyncio.gather(*(self._look(model_id) for model_id in self._models))
        found = {model_id: one for model_id, one in zip(self._models, seen, strict=True) if one is not None}
        snapshots = {
            model_id: tuple(report.snapshot for report in reports if report.snapshot is not None)
            for model_id, reports in found.items()
        }
        replicas = None
        if self._policy is not None and found:
            try:
                replicas = await self._steer([report for one in found.values() for report in one])
            except Exception:  # a bug here must not stop the looks, nor the groups
                self._metrics.failed("")
                self._log_rarely("decide")
        epoch = self._state.epoch if self._state is not None else 0
        self._view = ClusterView(time.time(), snapshots, epoch, replicas)
        self._metrics.ticked(time.monotonic() - started)

    async def _steer(self, reports: Sequence[GroupReport]) -> Mapping[str, int] | None:
        if self._policy is None or not any(report.snapshot for report in reports):
            return None
        now = self._clock()
        if self._state is None:
            self._state = recovered(reports, self._policy, now)
        started = time.monotonic()
        decision, self._state = decide(reports, self._state, self._policy, now)
        self._metrics.decided(decision, self._state, time.monotonic() - started)
        model_of = {report.group_id: report.model_id for report in reports}
        by_model: dict[str, list[Instruction]] = {}
        for instruction in decision.instructions:
            by_model.setdefault(model_of[instruction.group_id], []).append(instruction)
        for model_id, one in by_model.items():
            await self._instruct(model_id, one)
        return decision.replicas

    async def _instruct(self, model_id: str, instructions: Sequence[Instruction]) -> None:
        try:
            answers = await self._models[model_id].instruct(instructions)
        except Exception:  # it is said again next tick, as long as the groups' snapshots lack it
            self._metrics.failed(model_id)
            self._log_rarely(model_id)
            return
        for one in answers:
            outcome = one.answer.outcome if one.answer is not None else "unanswered"
            self._metrics.ordered(model_id, outcome)
            if outcome in ("applied", "deferred"):
                self._obeyed.add(one.group_id)
            if one.answer is not None and self._state is not None and one.answer.epoch > self._state.epoch:
                self._outranked(one.group_id, one.answer.epoch)

    def _outranked(self, group_id: str, epoch: int) -> None:
        """A group obeys a higher epoch. If it has obeyed this controller before, a later one has taken over;
        else it was away when this one started, and the next look finds what it obeys.
        """
        self._state = None
        if group_id in self._obeyed:
            self.is_replaced = True
            _log.warning("another controller, of epoch %d, has taken over: this one gives no orders", epoch)

    async def _look(self, model_id: str) -> Sequence[GroupReport] | None:
        try:
            found = await self._models[model_id].look()
        except Exception:  # the loop must outlive whatever a group or Ray does
            self._metrics.failed(model_id)
            self._log_rarely(model_id)
            return None
        self._metrics.looked(model_id, len(found))
        return found

    def _log_rarely(self, subject: str) -> None:
        if time.monotonic() - self._logged_s.get(subject, -_LOG_EVERY_S) >= _LOG_EVERY_S:
            self._logged_s[subject] = time.monotonic()
            _log.exception("the controller had trouble with %s; it goes on", subject)


class ControllerReplica:
    """The deployment's class: a Controller over Serve handles. Serve starts it again when it ends.

    Args:
        handles: of the TpGroup deployments, by model id.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, handles: Mapping[str, DeploymentHandle[Any]], tick_s: float, policy: PolicyConfig | None
    ) -> None:
        models = {model_id: _ServedGroups(handle) for model_id, handle in handles.items()}
        self._controller = Controller(models, tick_s, ControllerMetrics(RayBackend()), policy)
        # What has been imported lives as long as the process. In one without Ray, full collections were 15 to
        # 22 ms of the longest decisions over 256 groups, which took 43.
        gc.collect()
        gc.freeze()
        self._task = asyncio.create_task(self._controller.run())

    async def latest(self) -> ClusterView:
        """What the newest tick saw."""
        return self._controller.latest()

    async def check_health(self) -> None:
        """Serve replaces the replica when the loop has ended. Raises BallonetError."""
        if self._task.done():
            raise BallonetError("the controller's loop has ended")


class _ServedGroups:
    """Implements `Groups` over a handle."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def look(self) -> Sequence[GroupReport]:
        return await answers_of(self._handle, GroupReport, "report")

    async def instruct(self, instructions: Sequence[Instruction]) -> Sequence[InstructionAnswer]:
        by_group = {instruction.group_id: instruction for instruction in instructions}
        return await answers_of(self._handle, InstructionAnswer, "instruct", by_group)
