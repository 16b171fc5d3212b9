"""EngineActor: an engine with a Ray address. The only file of the engine that knows of Ray.

The engine lives in a thread of its own; the actor's event loop moves requests in and deltas out.
Light to import: torch is loaded when an actor is made, not where its class is named.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from engine.config import EngineConfig
from engine.errors import EngineDeadError, RequestError
from engine.messages import EngineInfo, EngineSnapshot, GenerateRequest, TokenDelta
from engine.tp.place import RankPlace

if TYPE_CHECKING:
    from engine.core import Engine

logger = logging.getLogger(__name__)

_STOP_S = 10.0  # a step takes well under a second; a thread that needs longer is stuck


class _Stream:
    """What one client has not read yet. Touched by the event loop alone."""

    def __init__(self) -> None:
        self._pending: TokenDelta | None = None
        self._ready = asyncio.Event()

    def put(self, delta: TokenDelta) -> None:
        """Deltas that pile up become one, so that a slow reader costs no memory per step."""
        self._pending = delta if self._pending is None else self._pending.then(delta)
        self._ready.set()

    async def get(self) -> TokenDelta:
        while self._pending is None:
            self._ready.clear()
            await self._ready.wait()
        delta, self._pending = self._pending, None
        return delta


class EngineActor:
    """One engine, served to other processes. Wrap it with `ray.remote`; all methods are coroutines.

    Args:
        config: of the engine. Loading starts at once, in the background; `info` waits for it.
        place: of the first rank, if the engine has several; the others are `RankActor`s.
    """

    def __init__(self, config: EngineConfig, place: RankPlace | None = None) -> None:
        self._config = config
        self._place = place
        self._streams: dict[str, _Stream] = {}
        self._stop = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engine: Engine | None = None
        self._failure: BaseException | None = None
        self._loaded = threading.Event()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._thread.start()

    async def info(self) -> EngineInfo:
        """Facts of the engine, once it is loaded.

        Raises:
            ConfigError, ModelLoadError: why it could not be.
        """
        return (await self._ready()).info

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenDelta]:
        """Deltas of one request as they come; what piles up between two reads comes as one.

        A reader that goes away cancels the request.

        Raises:
            RequestError, OverloadedError, EngineDeadError: before the first delta.
        """
        engine = await self._ready()
        self._loop = asyncio.get_running_loop()
        if request.request_id in self._streams:
            raise RequestError(f"a request with the id {request.request_id!r} is still open")
        stream = self._streams[request.request_id] = _Stream()
        done = False
        try:
            engine.submit(request)
            while not done:
                delta = await stream.get()
                done = delta.finish_reason is not None
                yield delta
        finally:
            self._streams.pop(request.request_id, None)
            if not done:
                engine.cancel(request.request_id)

    async def cancel(self, request_id: str) -> None:
        """End a request at the top of the next step; an id that is unknown or has ended is ignored."""
        if self._engine is not None:
            self._engine.cancel(request_id)

    async def snapshot(self) -> EngineSnapshot:
        """The engine's state after its newest step."""
        return (await self._ready()).snapshot

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
        """Raise EngineDeadError if the step loop has ended, whatever else still answers."""
        if self._failure is not None:
            raise EngineDeadError(f"the engine did not start: {self._failure}")
        if self._engine is not None:
            self._engine.check_alive()
            if not self._thread.is_alive():
                raise EngineDeadError("the engine's thread has ended")

    async def shutdown(self) -> None:
        """Stop the loop after the step in flight. Open requests end with an error."""
        self._stop.set()
        if self._engine is not None:
            self._engine.cancel("")  # wakes the loop
        await asyncio.to_thread(self._thread.join, _STOP_S)

    async def _ready(self) -> Engine:
        if not self._loaded.is_set():
            await asyncio.to_thread(self._loaded.wait)
        if self._failure is not None:
            raise self._failure
        if self._engine is None:
            raise EngineDeadError("the engine was stopped before it was ready")
        return self._engine

    def _main(self) -> None:
        from engine.build import build_engine  # brings torch in

        try:
            self._engine = build_engine(self._config, self._publish, place=self._place)
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

    def _publish(self, deltas: Sequence[TokenDelta]) -> None:
        if self._loop is not None and deltas:
            self._loop.call_soon_threadsafe(self._deliver, deltas)

    def _deliver(self, deltas: Sequence[TokenDelta]) -> None:
        for delta in deltas:
            if (stream := self._streams.get(delta.request_id)) is not None:
                stream.put(delta)


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
