"""One TP group: the Serve replica beside the engine that holds one copy of a model.

Owns the engine's actors (`cluster.ranks`), their health and their end. Tokens pass through; nothing here
knows text or HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass

from ray.exceptions import RayActorError, RayTaskError

from cluster.metrics import GroupMetrics, RayBackend
from cluster.ranks import Ranks, first_line
from engine.config import EngineConfig
from engine.errors import BallonetError, EngineDeadError
from engine.messages import EngineInfo, EngineSnapshot, GenerateRequest, TokenDelta

_SHUTDOWN_S = 10.0
_LAST_WORDS_S = 1.0  # for the first rank to hear of it by itself, and to end its streams
# To the top of the next step, which may be a long prefill, and then through the driver: 80 GiB take 1.3 s.
TRIM_S = 30.0


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
            threads = len(os.sched_getaffinity(0)) // config.tensor_parallel_size
            config = dataclasses.replace(config, num_threads=max(1, threads))
        self._ranks = Ranks(config, engine_class, resources, max_concurrency)
        self._engine = self._ranks.engine
        self._ended: str | None = None  # why a rank has
        self._watch = asyncio.create_task(self._end_together())
        try:
            self._info: EngineInfo = await self._engine.info.remote()
        except RayTaskError as error:
            self._ranks.kill()
            raise error.cause from None
        except RayActorError as error:
            self._ranks.kill()
            raise EngineDeadError(
                f"the engine's process ended while it loaded: {self._ended or first_line(error)}"
            ) from None
        self._metrics = GroupMetrics(RayBackend())

    async def _end_together(self) -> None:
        """Without one of its ranks an engine may wait for ever, and so would its clients."""
        self._ended = await self._ranks.ended()
        await asyncio.sleep(_LAST_WORDS_S)
        self._ranks.kill()

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
            yield Refusal(EngineDeadError(f"the engine's process ended: {first_line(error)}"))
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
            return Refusal(EngineDeadError(f"the engine's process ended: {first_line(error)}"))
        except RayTaskError as error:
            if not isinstance(error.cause, BallonetError):
                raise
            return Refusal(error.cause)
        return released

    async def record_routing_stats(self) -> dict[str, float]:
        """What `cluster.router` reads. Serve asks once per period, which also paces the metrics."""
        snapshot = await self.snapshot()
        if snapshot is None:
            return {}
        self._metrics.export(snapshot)
        return {
            "num_running": snapshot.num_running,
            "num_waiting": snapshot.num_waiting,
            # Of live sequences alone: cached prefixes are given up when a request needs their memory.
            "kv_usage": snapshot.memory.kv / max(snapshot.memory.total, 1),
            "num_steps": snapshot.num_steps,
        }

    async def check_health(self) -> None:
        """Asks the engine's step loop, not only the process. Serve replaces the replica if it raises."""
        await self._engine.check_health.remote()

    async def __del__(self) -> None:
        with contextlib.suppress(RayActorError, RayTaskError, TimeoutError):
            await asyncio.wait_for(self._engine.shutdown.remote(), _SHUTDOWN_S)
        self._watch.cancel()
        self._ranks.kill()
