"""EngineActor: an engine with a Ray address. The only file of the engine that knows of Ray.

The engine lives in a thread of its own; the actor's event loop moves requests in. Deltas go out past Ray
(`engine.token_sender`): a call of `generate` is open as long as its request, and carries no tokens.
Light to import: torch is loaded when an actor is made, not where its class is named.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from engine.config import EngineConfig
from engine.control import HostSnapshot, Order, OrderAnswer
from engine.errors import BallonetError, EngineDeadError
from engine.messages import EngineInfo, EngineSnapshot, GenerateRequest, ReplyTo, TokenDelta
from engine.migration import (
    Accepted,
    Declined,
    Migrated,
    MigrationOffer,
    MigrationResult,
    SequenceState,
)
from engine.migrator import Migrator
from engine.open_requests import OpenRequests
from engine.request_door import RequestDoor
from engine.request_wire import EngineAddress
from engine.token_sender import TokenSender
from engine.tp.place import RankPlace

if TYPE_CHECKING:
    from engine.core import Engine

logger = logging.getLogger(__name__)

_HOST_S = 1.0  # between two looks at the host's memory, which takes a fraction of a millisecond
_DRAIN_S = 0.1  # between two looks
_PEER_S = 30.0  # another engine answers between two steps, of which one may be a long prompt's
_STOP_S = 10.0  # a step takes well under a second; a thread that needs longer is stuck


class EngineActor:
    """One engine, served to other processes. Wrap it with `ray.remote`; all methods are coroutines.

    Args:
        config: of the engine. Loading starts at once, in the background; `info` waits for it.
        place: of the first rank, if the engine has several; the others are `RankActor`s.
        clock: the engine's own, by which its steps are watched.
    """

    def __init__(
        self,
        config: EngineConfig,
        place: RankPlace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._place = place
        self._clock = clock
        self._sender = TokenSender(self._cancel)
        self._requests = OpenRequests(self._sender, self._submit, self._cancel)
        self._door: RequestDoor | None = None
        self._stop = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engine: Engine | None = None
        self._migrator: Migrator | None = None
        self._failure: BaseException | None = None
        self._loaded = threading.Event()
        self._host: HostSnapshot | None = None
        self._host_s = 0.0
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._thread.start()

    async def info(self) -> EngineInfo:
        """Facts of the engine, once it is loaded.

        Raises:
            ConfigError, ModelLoadError: why it could not be.
        """
        return (await self._ready()).info

    async def generate(self, request: GenerateRequest, reply_to: ReplyTo) -> Migrated | None:
        """Sends the request's deltas to `reply_to` as they come, and returns when the last one is sent, or
        where the request goes on: there `attend` is to be called.

        Whoever cancels this call cancels the request; so does an ingress that goes away.

        Raises:
            RequestError, OverloadedError: it was not taken.
            EngineDeadError: nobody can finish it here.
        """
        await self._ready()
        self._loop = asyncio.get_running_loop()
        return await self._requests.run(request, reply_to)

    async def door(self) -> EngineAddress:
        """Where the engine takes requests past Ray, once it is loaded.

        Raises:
            ConfigError, ModelLoadError: why it could not be.
        """
        await self._ready()
        if self._door is None:
            self._loop = asyncio.get_running_loop()
            self._door = RequestDoor(_address_of_node(), self._requests)
        return self._door.door

    async def attend(self, migration_id: str, request_id: str, reply_to: ReplyTo) -> Migrated | None:
        """As `generate`, for a request that has moved here: it goes on from now on.

        Raises:
            EngineDeadError: it is not here, or nobody can finish it here.
        """
        migrator = await self._migrations()
        self._loop = asyncio.get_running_loop()
        return await self._requests.attend(request_id, reply_to, lambda: migrator.adopt(migration_id))

    async def migrate(
        self, target: str, group_id: str, request_id: str | None = None, min_stay_s: float = 0.0
    ) -> MigrationResult:
        """Move a parked request to another engine (`engine.migrator.Migrator.send`).

        Args:
            target: name of its actor.
            group_id: of its replica.
        """
        return await (await self._migrations()).send(ActorPeer(target), group_id, request_id, min_stay_s)

    async def prepare_migration(self, offer: MigrationOffer) -> Accepted | Declined:
        """Make room for a request of another engine."""
        return await (await self._migrations()).prepare(offer)

    async def take_in(self, migration_id: str, state: SequenceState) -> Declined | None:
        """All of a request has come; None if it is safe here."""
        return await (await self._migrations()).take_in(migration_id, state)

    async def forget(self, migration_id: str) -> None:
        """A request does not come."""
        await (await self._migrations()).forget(migration_id)

    async def _migrations(self) -> Migrator:
        if self._migrator is None:
            self._migrator = Migrator(await self._ready(), self._sender, self._requests.is_claimed)
        return self._migrator

    async def cancel(self, request_id: str) -> None:
        """End a request at the top of the next step; an id that is unknown or has ended is ignored."""
        self._cancel(request_id)

    async def snapshot(self) -> EngineSnapshot:
        """The engine's state after its newest step, and that of its host."""
        snapshot = (await self._ready()).snapshot
        return replace(snapshot, host=self._look_at_host(), num_ranks=self._config.tensor_parallel_size)

    async def apply(self, order: Order) -> OrderAnswer:
        """Follow an order of the controller at the top of the next step (`engine.orders`).

        Raises:
            EngineDeadError: the loop has ended.
        """
        engine = await self._ready()
        try:
            return await asyncio.wrap_future(engine.apply(order))
        except asyncio.CancelledError:
            engine.check_alive()  # as for `trim`
            raise

    async def trim(self, drop_cache: bool = False) -> int:
        """Give the memory of free chunks back to the device, with `drop_cache` that of cached prefixes too;
        the bytes given back. Done at the top of the next step; chunks are made again when they are needed.

        Raises:
            EngineDeadError: the loop has ended.
        """
        engine = await self._ready()
        try:
            return await asyncio.wrap_future(engine.trim(drop_cache))
        except asyncio.CancelledError:
            engine.check_alive()  # a loop that has ended cancels the orders it did not come to
            raise

    async def check_health(self) -> None:
        """Raise EngineDeadError if the step loop has ended or stands still, whatever else still answers."""
        if self._failure is not None:
            raise EngineDeadError(f"the engine did not start: {self._failure}")
        if self._engine is None:
            return  # it loads; whoever waits for `info` sees how that ends
        self._check_alive()
        # Made anew after every step, and twice a second where there is nothing to do.
        still_s = self._clock() - self._engine.snapshot.monotonic_s
        if still_s > self._config.step_timeout_s:
            raise EngineDeadError(
                f"no step has ended for {still_s:.0f} s (step_timeout_s is {self._config.step_timeout_s:.0f})"
            )

    def _check_alive(self) -> None:
        if self._engine is not None:
            self._engine.check_alive()
            if not self._thread.is_alive():
                raise EngineDeadError("the engine's thread has ended")

    async def drain(self) -> None:
        """Returns when no request is under way that no call waits for: Serve does not know of those."""
        while self._engine is not None and self._requests.num_unclaimed:
            self._check_alive()
            await asyncio.sleep(_DRAIN_S)

    async def shutdown(self) -> None:
        """Stop the loop after the step in flight. Open requests end with an error."""
        self._stop.set()
        if self._engine is not None:
            self._engine.cancel("")  # wakes the loop
        await asyncio.to_thread(self._thread.join, _STOP_S)
        if self._door is not None:
            self._door.close()
        self._sender.shut()

    async def _ready(self) -> Engine:
        if not self._loaded.is_set():
            await asyncio.to_thread(self._loaded.wait)
        if self._failure is not None:
            raise self._failure
        if self._engine is None:
            raise EngineDeadError("the engine was stopped before it was ready")
        return self._engine

    def _look_at_host(self) -> HostSnapshot:
        import ray

        from engine.memory.host_memory import available_bytes, total_bytes

        now = time.monotonic()
        if self._host is None or now - self._host_s >= _HOST_S:
            # Outside Ray, as in a test, asking for the node would start a cluster.
            node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
            self._host, self._host_s = HostSnapshot(node, total_bytes(), available_bytes()), now
        return self._host

    def _main(self) -> None:
        from engine.build import build_engine  # brings torch in

        try:
            self._engine = build_engine(
                self._config, self._publish, place=self._place, host=_address_of_node()
            )
        except Exception as error:  # told to whoever asks; a thread has nobody to raise to
            logger.exception("engine did not start")
            self._failure = error
            return
        finally:
            self._loaded.set()
        # What has been imported and built lives as long as the process. Left to the collector, each of
        # its full runs holds a step up by 300 ms (torch and triton; one in some hundred steps).
        gc.collect()
        gc.freeze()
        self._engine.run_until(self._stop)

    def _submit(self, request: GenerateRequest) -> None:
        if self._engine is None:
            raise EngineDeadError("the engine was stopped before it was ready")
        self._engine.submit(request)

    def _cancel(self, request_id: str) -> None:
        if self._engine is not None:
            self._engine.cancel(request_id)

    def _publish(self, deltas: Sequence[TokenDelta]) -> None:
        if self._loop is not None and deltas:
            self._loop.call_soon_threadsafe(self._deliver, deltas)

    def _deliver(self, deltas: Sequence[TokenDelta]) -> None:
        try:
            self._check_alive()
        except EngineDeadError as death:
            # These are its last words. An error of the engine's, not the request's: it may go elsewhere.
            for delta in deltas:
                if delta.finish_reason == "error":
                    self._sender.fail(delta.request_id, death)
            deltas = [delta for delta in deltas if delta.finish_reason != "error"]
        self._sender.put(deltas)


class ActorPeer:
    """Another engine's actor. Implements `engine.migrator.Peer`.

    Args:
        name: of the actor, in this one's namespace.
        timeout_s: for each answer.
    """

    def __init__(self, name: str, timeout_s: float = _PEER_S) -> None:
        self._name = name
        self._timeout_s = timeout_s

    async def prepare(self, offer: MigrationOffer) -> Accepted | Declined:
        answer: Accepted | Declined = await self._call("prepare_migration", offer)
        return answer

    async def take_in(self, migration_id: str, state: SequenceState) -> Declined | None:
        answer: Declined | None = await self._call("take_in", migration_id, state)
        return answer

    async def forget(self, migration_id: str) -> None:
        await self._call("forget", migration_id)

    async def _call(self, method: str, *arguments: object) -> Any:
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        try:
            actor = await asyncio.to_thread(ray.get_actor, self._name)
            return await asyncio.wait_for(getattr(actor, method).remote(*arguments), self._timeout_s)
        except TimeoutError:
            raise EngineDeadError(f"{self._name} has not answered for {self._timeout_s:.0f} s") from None
        except (RayActorError, ValueError) as error:  # the latter if there is no actor of that name
            raise EngineDeadError(f"{self._name} is gone: {error}") from None
        except RayTaskError as error:
            if isinstance(error.cause, BallonetError):
                raise error.cause from None
            raise


def _address_of_node() -> str:
    """By which engines on other nodes reach this one."""
    import ray

    return str(ray.util.get_node_ip_address())


class RankActor:
    """A rank beside the first one of an engine. Wrap it with `ray.remote`.

    Args:
        config: the engine's.
        place: of this rank.
    """

    def __init__(self, config: EngineConfig, place: RankPlace) -> None:
        self._config = config
        self._place = place

    def follow(self) -> None:
        """Load, and do as the first rank does; returns when that has ended.

        Raises:
            BallonetError: this rank could not go on, which ends the engine.
        """
        from engine.tp.follower import follow  # brings torch in

        follow(self._config, self._place)
