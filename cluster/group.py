"""One TP group: the Serve replica beside the engine that holds one copy of a model.

Owns the engine actor (rank 0; more ranks are not there yet), its place in the replica's placement
group, its health and its end. Tokens pass through; nothing here knows text or HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.metrics import GroupMetrics, RayBackend
from cluster.ranking import routing_stats
from cluster.reports import GroupReport, Instruction, InstructionAnswer
from cluster.scaling import WANTED
from engine.config import EngineConfig
from engine.control import OrderAnswer
from engine.errors import BallonetError, EngineDeadError
from engine.messages import EngineInfo, EngineSnapshot, GenerateRequest, TokenDelta

ENGINE_BUNDLE = 1  # bundle 0 of the placement group holds the replica itself
_SHUTDOWN_S = 10.0
# To the top of the next step, which may be a long prefill, and then through the driver: 80 GiB take 1.3 s.
TRIM_S = 30.0
_ENGINE_S = 1.5  # for a control call: less than the controller waits for the group


@dataclass(frozen=True, slots=True)
class Refusal:
    """Sent instead of the first delta. A value, because Serve logs a traceback for every exception
    that leaves a replica, and refusals come by the hundred when the system is full."""

    error: BallonetError


class TpGroup:
    """The deployment's class. Its methods are called through a handle.

    Args:
        config: of the engine.
        engine_class: a plain class shaped like `engine.actor.EngineActor`.
        resources: what the engine's bundle reserves, such as `{"CPU": 1, "GPU": 1}`.
        max_concurrency: calls the engine actor takes at once.

    Raises:
        ConfigError, ModelLoadError: the engine did not start; the message is the engine's.
        EngineDeadError: its process ended, for one because the node ran out of memory.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        config: EngineConfig,
        engine_class: type,
        resources: Mapping[str, float],
        max_concurrency: int,
    ) -> None:
        if config.device == "cpu" and config.num_threads is None:
            # Ray limits OpenMP to the CPUs an actor reserves, and a CPU rank reserves half of one.
            config = dataclasses.replace(config, num_threads=len(os.sched_getaffinity(0)))
        self._config = config
        self._wanted_replicas = 0
        self._engine = _place(engine_class, resources, max_concurrency).remote(config)
        try:
            self._info: EngineInfo = await self._engine.info.remote()
        except RayTaskError as error:
            ray.kill(self._engine)
            raise error.cause from None
        except RayActorError as error:
            raise EngineDeadError(
                f"the engine's process ended while it loaded: {_first_line(error)}"
            ) from None
        self._metrics = GroupMetrics(RayBackend())

    async def info(self) -> EngineInfo:
        """Facts of the loaded engine."""
        return self._info

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta | Refusal, None]:
        """The engine's deltas, or one Refusal. Closing or cancelling cancels in the engine."""
        stream = self._engine.generate.options(num_returns="streaming").remote(request)
        has_ended = False
        try:
            async for reference in stream:
                delta = await reference
                has_ended = delta.finish_reason is not None
                yield delta
        except RayActorError as error:
            has_ended = True
            yield Refusal(EngineDeadError(f"the engine's process ended: {_first_line(error)}"))
        except RayTaskError as error:
            if not isinstance(error.cause, BallonetError):
                raise
            has_ended = True
            yield Refusal(error.cause)
        finally:
            if not has_ended:
                # Where Serve cancels this call, Ray cancels the engine's generator as well, and may
                # cancel this very message with it (seen with Ray 2.60): either way is enough.
                self._engine.cancel.remote(request.request_id)

    async def snapshot(self) -> EngineSnapshot | None:
        """Facts of this moment; None when the engine is dead."""
        try:
            snapshot: EngineSnapshot = await self._engine.snapshot.remote()
        except (RayActorError, EngineDeadError):
            return None
        return snapshot

    async def trim(self, drop_cache: bool) -> int | Refusal:
        """Bytes that the engine gave back to its device."""
        try:
            released: int = await asyncio.wait_for(self._engine.trim.remote(drop_cache), TRIM_S)
        except TimeoutError:
            return Refusal(EngineDeadError(f"the engine has not come to it within {TRIM_S:.0f} s"))
        except RayActorError as error:
            return Refusal(EngineDeadError(f"the engine's process ended: {_first_line(error)}"))
        except RayTaskError as error:
            if not isinstance(error.cause, BallonetError):
                raise
            return Refusal(error.cause)
        return released

    async def report(self) -> GroupReport:
        """What the controller wants to know."""
        try:
            snapshot = await asyncio.wait_for(self.snapshot(), _ENGINE_S)
        except TimeoutError:
            snapshot = None
        return GroupReport(
            serve.get_replica_context().replica_id.unique_id,
            self._config.model.model_id,
            1,
            self._config.slo.ttft_ms / 1e3,
            snapshot,
            self._wanted_replicas,
        )

    async def instruct(self, instructions: Mapping[str, Instruction]) -> InstructionAnswer | None:
        """Follow what the controller wants of this group; None if it wants nothing."""
        group_id = serve.get_replica_context().replica_id.unique_id
        if (mine := instructions.get(group_id)) is None:
            return None
        self._wanted_replicas = mine.wanted_replicas
        answer: OrderAnswer | None = None
        with contextlib.suppress(RayActorError, RayTaskError, TimeoutError):  # the controller says it again
            answer = await asyncio.wait_for(self._engine.apply.remote(mine.order), _ENGINE_S)
        return InstructionAnswer(group_id, answer)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `cluster.scaling` reads: the groups that this model should have; 0 if nobody has said."""
        return {WANTED: float(self._wanted_replicas)}

    async def record_routing_stats(self) -> dict[str, float]:
        """What `cluster.router` reads. Serve asks once per period, which also paces the metrics."""
        snapshot = await self.snapshot()
        if snapshot is None:
            return {}
        self._metrics.export(snapshot)
        return routing_stats(snapshot, self._config.slo.ttft_ms / 1e3)

    async def check_health(self) -> None:
        """Asks the engine's step loop, not only the process. Serve replaces the replica if it raises."""
        await self._engine.check_health.remote()

    async def __del__(self) -> None:
        with contextlib.suppress(RayActorError, RayTaskError, TimeoutError):
            await asyncio.wait_for(self._engine.shutdown.remote(), _SHUTDOWN_S)
        ray.kill(self._engine)


def _place(engine_class: type, resources: Mapping[str, float], max_concurrency: int) -> Any:
    """The engine's actor class, bound to its bundle and to a name that tells whose it is."""
    replica = serve.get_replica_context()
    others = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    return ray.remote(engine_class).options(
        name=f"{replica.app_name}:{replica.deployment}:{replica.replica_tag}:rank0",
        num_cpus=resources.get("CPU", 0),
        num_gpus=resources.get("GPU", 0),
        resources=others or None,
        max_concurrency=max_concurrency,
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            get_current_placement_group(), placement_group_bundle_index=ENGINE_BUNDLE
        ),
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
