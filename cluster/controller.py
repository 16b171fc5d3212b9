"""The cluster's observer: looks at every group once per tick and remembers what it saw.

It decides nothing yet and no request passes through it: serving goes on when it is away.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ray.serve.handle import DeploymentHandle

from cluster.metrics import ControllerMetrics, RayBackend
from cluster.served_model import snapshots_of
from engine.messages import EngineSnapshot

_LOG_EVERY_S = 60.0
_log = logging.getLogger("ray.serve")

Look = Callable[[], Awaitable[list[EngineSnapshot]]]


@dataclass(frozen=True, slots=True)
class ClusterView:
    """What one tick saw.

    Attributes:
        taken_s: Unix time; 0 before the first tick.
        groups: snapshots by model id; a model whose look failed is missing.
    """

    taken_s: float
    groups: Mapping[str, tuple[EngineSnapshot, ...]]


class Controller:
    """The loop around the looks.

    Args:
        looks: by model id, what returns the snapshots of its groups.
        tick_s: pause between two ticks.
        metrics: where the controller's own metrics go.
    """

    def __init__(self, looks: Mapping[str, Look], tick_s: float, metrics: ControllerMetrics) -> None:
        self._looks = looks
        self._tick_s = tick_s
        self._metrics = metrics
        self._view = ClusterView(0.0, {})
        self._logged_s = -_LOG_EVERY_S

    def latest(self) -> ClusterView:
        """What the newest tick saw."""
        return self._view

    async def run(self) -> None:
        """Ticks until cancelled."""
        while True:
            await self.tick()
            await asyncio.sleep(self._tick_s)

    async def tick(self) -> None:
        """One look at all models, side by side. Never raises."""
        started = time.monotonic()
        seen = await asyncio.gather(*(self._look(model_id) for model_id in self._looks))
        groups = {
            model_id: found for model_id, found in zip(self._looks, seen, strict=True) if found is not None
        }
        self._view = ClusterView(time.time(), groups)
        self._metrics.ticked(time.monotonic() - started)

    async def _look(self, model_id: str) -> tuple[EngineSnapshot, ...] | None:
        try:
            found = tuple(await self._looks[model_id]())
        except Exception:  # the loop must outlive whatever a group or Ray does
            self._metrics.failed(model_id)
            self._log_rarely(model_id)
            return None
        self._metrics.looked(model_id, len(found))
        return found

    def _log_rarely(self, model_id: str) -> None:
        if time.monotonic() - self._logged_s >= _LOG_EVERY_S:
            self._logged_s = time.monotonic()
            _log.exception("the controller could not look at %s; it goes on", model_id)


class ControllerReplica:
    """The deployment's class: a Controller over Serve handles."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, handles: Mapping[str, DeploymentHandle[Any]], tick_s: float
    ) -> None:
        looks = {model_id: _look_through(handle) for model_id, handle in handles.items()}
        self._controller = Controller(looks, tick_s, ControllerMetrics(RayBackend()))
        self._task = asyncio.create_task(self._controller.run())

    async def latest(self) -> ClusterView:
        """What the newest tick saw."""
        return self._controller.latest()

    async def check_health(self) -> None:
        """Serve replaces the replica when the loop has ended."""
        if self._task.done():
            raise RuntimeError("the controller's loop has ended")


def _look_through(handle: DeploymentHandle[Any]) -> Look:
    async def look() -> list[EngineSnapshot]:
        return await snapshots_of(handle)

    return look
