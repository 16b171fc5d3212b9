"""One TP group: the Serve replica beside the engine that holds one copy of a model.

Owns the engine's actors (`cluster.ranks`), their health and their end: the replica and its ranks live and die
together. Tokens do not come by here; a call of `generate` is open as long as its request, which is what Serve
counts, cancels and drains.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from ray import serve
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayTaskError

from cluster.metrics import GroupMetrics, RayBackend
from cluster.ranking import routing_stats
from cluster.ranks import Ranks, engine_name, first_line
from cluster.reports import GroupReport, Instruction, InstructionAnswer, MigrationOrder
from cluster.scaling import WANTED
from engine.config import EngineConfig
from engine.control import OrderAnswer
from engine.errors import BallonetError, EngineDeadError
from engine.messages import EngineInfo, EngineSnapshot, GenerateRequest, ReplyTo
from engine.migration import Migrated, MigrationResult
from engine.request_wire import EngineAddress

_SHUTDOWN_S = 10.0
_WATCH_S = 0.5  # between two looks at the ranks; a call that fails tells at once
_LOADING_WORDS_S = 2.0
_LAST_WORDS_S = 0.2  # for the answers of open calls to leave this process
# To the top of the next step, which may be a long prefill, and then through the driver: 80 GiB take 1.3 s.
TRIM_S = 30.0
_log = logging.getLogger("ray.serve")
_ENGINE_S = 1.5  # for a control call: less than the controller waits for the group


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request, or an order, was not done. A value, because Serve logs a traceback for every exception
    that leaves a replica, and refusals come by the hundred when the system is full.

    Attributes:
        was_begun: the engine may have had it; what ended that engine may have been this request.
    """

    error: BallonetError
    was_begun: bool = True


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
        self._config = config
        self._wanted_replicas = 0
        self._migration: asyncio.Task[None] | None = None
        self._last_migration = (-1, -1)
        self._death: EngineDeadError | None = None
        self._watch: asyncio.Task[None] | None = None
        self._step_timeout_s = config.step_timeout_s
        self._ranks = Ranks(config, engine_class, resources, max_concurrency)
        self._engine = self._ranks.engine
        self._together = asyncio.create_task(self._end_together())
        try:
            self._info: EngineInfo = await self._engine.info.remote()
            self._door: EngineAddress = await self._engine.door.remote()
        except RayTaskError as error:
            self._ranks.kill()
            raise error.cause from None
        except RayActorError as error:
            self._ranks.kill()
            raise EngineDeadError(
                f"the engine's process ended while it loaded: {self._death or first_line(error)}"
            ) from None
        self._metrics = GroupMetrics(RayBackend())
        self._watch = asyncio.create_task(self._watch_engine())

    async def _end_together(self) -> None:
        """Without one of its ranks an engine may wait for ever, and so would its clients."""
        self._death = EngineDeadError(await self._ranks.ended())
        if self._watch is None:  # what could not load tells the first rank why, which says it better
            await asyncio.sleep(_LOADING_WORDS_S)
        self._ranks.kill()

    async def info(self) -> EngineInfo:
        """Facts of the loaded engine."""
        return self._info

    async def generate(self, request: GenerateRequest, reply_to: ReplyTo) -> Refusal | Migrated | None:
        """Returns when the engine has sent the last delta to `reply_to`, or why there will be none, or which
        group goes on with the request: its `attend` is to be called. Cancelling cancels in the engine."""
        if self._death is not None:
            return Refusal(self._death, was_begun=False)
        return await self._answer(self._engine.generate.remote(request, reply_to), request.request_id)

    async def attend(self, moved: Migrated, request_id: str, reply_to: ReplyTo) -> Refusal | Migrated | None:
        """As `generate`, for a request that has moved here."""
        if self._death is not None:
            return Refusal(self._death)
        call = self._engine.attend.remote(moved.migration_id, request_id, reply_to)
        return await self._answer(call, request_id)

    async def _answer(self, call: Any, request_id: str) -> Refusal | Migrated | None:
        has_ended = False
        try:
            migrated: Migrated | None = await call
            has_ended = True
        except RayActorError as error:
            has_ended = True
            death = EngineDeadError(f"the engine's process ended: {first_line(error)}")
            if isinstance(error, ActorDiedError):  # not one that is out of reach for a moment
                self._death = self._death or death
            # Where the watch has ended the process, it knows better why.
            return Refusal(self._death or death)
        except RayTaskError as error:
            if not isinstance(error.cause, BallonetError):
                raise
            has_ended = True
            return Refusal(error.cause)
        finally:
            if not has_ended:
                # Where Serve cancels this call, Ray cancels the engine's as well, and may cancel this very
                # message with it (seen with Ray 2.60): either way is enough.
                self._engine.cancel.remote(request_id)
        return migrated

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

    async def report(self) -> GroupReport:
        """What the controller wants to know."""
        try:
            snapshot = await asyncio.wait_for(self.snapshot(), _ENGINE_S)
        except TimeoutError:
            snapshot = None
        return GroupReport(
            serve.get_replica_context().replica_id.unique_id,
            self._config.model.model_id,
            self._config.tensor_parallel_size,
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
        if mine.migration is not None:
            self._begin_migration(mine.migration)
        return InstructionAnswer(group_id, answer)

    def _begin_migration(self, order: MigrationOrder) -> None:
        """Move a request in the background, one at a time; an order that is not new is done already."""
        number = order.epoch, order.revision
        is_busy = self._migration is not None and not self._migration.done()
        if number > self._last_migration and not is_busy:
            self._last_migration = number
            self._migration = asyncio.create_task(self._migrate(order))

    async def _migrate(self, order: MigrationOrder) -> None:
        target = engine_name(order.group_id)
        try:
            result: MigrationResult = await self._engine.migrate.remote(
                target, order.group_id, min_stay_s=order.min_stay_s
            )
        except (RayActorError, RayTaskError) as error:
            result = MigrationResult("failed", first_line(error))
        self._metrics.migrated(self._config.model.model_id, result)
        if result.outcome == "migrated":
            told = f"{result.num_bytes / 2**20:.0f} MiB in {result.seconds:.2f} s"
        else:
            told = result.reason
        _log.info("migration to %s: %s (%s)", order.group_id, result.outcome, told)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `cluster.scaling` reads: the groups that this model should have; 0 if nobody has said."""
        return {WANTED: float(self._wanted_replicas)}

    async def record_routing_stats(self) -> dict[str, Any]:
        """What `cluster.router` reads. Serve asks once per period, which also paces the metrics."""
        snapshot = await self.snapshot()
        if snapshot is None:
            return {}
        self._metrics.export(snapshot)
        return routing_stats(snapshot, self._config.slo.ttft_ms / 1e3, self._door)

    async def check_health(self) -> None:
        """Tells what the watch has found. Serve replaces the replica if it raises, or is gone."""
        if self._death is not None:
            raise self._death
        if self._watch is None or self._watch.done():
            raise EngineDeadError("nobody watches the engine any more")

    async def __del__(self) -> None:
        self._together.cancel()
        if self._watch is not None:
            self._watch.cancel()
        with contextlib.suppress(RayActorError, RayTaskError, TimeoutError):
            await self._engine.drain.remote()  # Serve kills a replica that takes longer than it may
            await asyncio.wait_for(self._engine.shutdown.remote(), _SHUTDOWN_S)
        self._ranks.kill()

    async def _watch_engine(self) -> None:
        """Looks at the step loop, not only at the processes, until a rank is dead."""
        loop = asyncio.get_running_loop()
        well_s = loop.time()
        while self._death is None:
            left_s = well_s + self._step_timeout_s - loop.time()
            try:
                await asyncio.wait_for(self._engine.check_health.remote(), left_s)
                well_s = loop.time()
            except ActorUnavailableError:
                pass  # the connection broke; the process may be well
            except TimeoutError:
                self._death = EngineDeadError(f"the engine has not answered for {self._step_timeout_s:.0f} s")
            except (RayActorError, RayTaskError) as error:
                cause = error.cause if isinstance(error, RayTaskError) else error
                self._death = EngineDeadError(f"the engine is dead: {first_line(cause)}")
            await asyncio.sleep(_WATCH_S if self._death is None else 0)
        await self._end(self._death)

    async def _end(self, death: EngineDeadError) -> NoReturn:
        """A group that lacks a rank is of no use, and the router would like it, as it has nothing to do.

        An ended process is what routers and Serve's controller notice soonest: a replica that is merely
        unhealthy is asked three times, and then waited for.
        """
        _log.error("this group ends, to be replaced: %s", death)
        self._ranks.kill()
        await asyncio.sleep(_LAST_WORDS_S)
        os._exit(1)
