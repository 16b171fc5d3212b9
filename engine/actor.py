"""EngineActor: an engine with a Ray address. The only file of the engine that knows of Ray.

The engine lives in a thread of its own; the actor's event loop moves requests in and deltas out.
Light to import: torch is loaded when an actor is made, not where its class is named.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from engine.config import EngineConfig
from engine.control import HostSnapshot, Order, OrderAnswer
from engine.errors import EngineDeadError, RequestError
from engine.messages import EngineInfo, EngineSnapshot, GenerateRequest, TokenDelta

if TYPE_CHECKING:
    from engine.core import Engine

logger = logging.getLogger(__name__)

_HOST_S = 1.0  # between two looks at the host's memory, which takes a fraction of a millisecond
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
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._streams: dict[str, _Stream] = {}
        self._stop = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engine: Engine | None = None
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
        """The engine's state after its newest step, and that of its host."""
        return replace((await self._ready()).snapshot, host=self._look_at_host())

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

    def _look_at_host(self) -> HostSnapshot:
        import ray

        from engine.memory.host_memory import available_bytes, total_bytes

        now = time.monotonic()
        if self._host is None or now - self._host_s >= _HOST_S:
            node = ray.get_runtime_context().get_node_id()
            self._host, self._host_s = HostSnapshot(node, total_bytes(), available_bytes()), now
        return self._host

    def _main(self) -> None:
        from engine.build import build_engine  # brings torch in

        try:
            self._engine = build_engine(self._config, self._publish)
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
