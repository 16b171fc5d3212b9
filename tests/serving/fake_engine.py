"""An engine actor without a model: the shape of `engine.actor.EngineActor`, tokens by arithmetic.

What the first token of a prompt asks for:  token 1 is answered at once, 2 slowly and without end, 3 is
refused as a wrong request, 4 as overload, 5 kills the process after one token, 6 before any, 7 does so once:
another process that sees it answers. 8 gets one token, and then the step loop stands still. 9 is answered
after two seconds. 10 is cut off from its ingress after a token, 11 before any, once. More requests than
max_num_seqs are late. A prompt that was seen with the same salt is cached but for its last token, in a chunk
of its own.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path

import ray

from engine.config import EngineConfig
from engine.control import Order, OrderAnswer
from engine.errors import EngineDeadError, ModelLoadError, OverloadedError, RequestError
from engine.messages import (
    EngineInfo,
    EngineSnapshot,
    GenerateRequest,
    MemorySnapshot,
    ReplyTo,
    TokenDelta,
)
from engine.open_requests import OpenRequests
from engine.request_door import RequestDoor
from engine.request_wire import EngineAddress
from engine.token_sender import TokenSender
from tests.cut_proxy import CutProxy

TOTAL, CHUNK_BYTES = 64, 1 << 20
QUICK, SLOW, WRONG, FULL, FATAL, POISON, UNLUCKY, STUCK, LATE = 1, 2, 3, 4, 5, 6, 7, 8, 9
CUT, UNSENT = 10, 11
_SILENCE_S = 2.0  # of a connection that is cut


class _Requests(OpenRequests):
    """Leaves to their calls what goes over a network of its own."""

    def begin(self, request: GenerateRequest, reply_to: ReplyTo) -> None:
        if request.prompt_token_ids[0] not in (CUT, UNSENT):
            super().begin(request, reply_to)


class FakeEngine:
    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._running: set[str] = set()
        self._finished: Counter[str] = Counter()
        self._generated = 0
        self._cache: set[tuple[str, tuple[int, ...]]] = set()
        self._created = TOTAL
        self._queries = self._hits = 0
        self._sender = TokenSender(self._running.discard)
        self._requests = _Requests(self._sender, self._submit, self._running.discard)
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_stuck = False
        self._order: Order | None = None

    async def info(self) -> EngineInfo:
        if self._config.model.source == "missing":
            raise ModelLoadError("there is no model called missing")
        return EngineInfo(
            model_id=self._config.model.model_id,
            device="cpu",
            dtype="float32",
            max_model_len=512,
            vocab_size=49152,
            eos_token_ids=(2,),
            pool_bytes=64 << 20,
            weight_bytes=1 << 20,
            tokens_per_chunk=16,
            layers_per_group=1,
            load_s=0.1,
        )

    async def door(self) -> EngineAddress:
        self._door = RequestDoor(ray.util.get_node_ip_address(), self._requests)
        return self._door.door

    async def generate(self, request: GenerateRequest, reply_to: ReplyTo) -> None:
        order = request.prompt_token_ids[0]
        if order == CUT or (order == UNSENT and _is_first(request)):
            await self._answer_by_a_network_that_is_cut(request, reply_to, order)
        else:
            await self._requests.run(request, reply_to)

    def _submit(self, request: GenerateRequest) -> None:
        order = request.prompt_token_ids[0]
        if order == WRONG:
            raise RequestError("this prompt is wrong", "prompt", "bad_prompt")
        if order == FULL:
            raise OverloadedError("the queue is full (1)", 7.0)
        self._running.add(request.request_id)
        self._created = max(self._created, len(self._running) + len(self._cache))
        task = asyncio.get_running_loop().create_task(self._answer(request, order, self._sender))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, request: GenerateRequest, order: int, sender: TokenSender) -> None:
        reason = "cancelled"
        try:
            async for delta in self._tokens(request, order):
                self._generated += len(delta.token_ids)
                reason = delta.finish_reason or reason
                sender.put([delta])
        finally:
            self._running.discard(request.request_id)
            self._finished[reason] += 1

    async def _answer_by_a_network_that_is_cut(
        self, request: GenerateRequest, reply_to: ReplyTo, order: int
    ) -> None:
        proxy = CutProxy(reply_to.address)
        await proxy.start()
        sender = TokenSender(self._running.discard, silence_s=_SILENCE_S)
        cut = asyncio.get_running_loop().call_later(0.5, proxy.cut)
        self._running.add(request.request_id)
        ended = sender.open(request.request_id, replace(reply_to, address=proxy.address))
        try:
            await self._answer(request, order, sender)
            await ended
        finally:
            cut.cancel()
            sender.shut()
            proxy.close()

    async def _tokens(self, request: GenerateRequest, order: int) -> AsyncGenerator[TokenDelta, None]:
        last = request.sampling.max_tokens - 1
        key = (request.cache_salt, request.prompt_token_ids)
        cached = len(request.prompt_token_ids) - 1 if key in self._cache else 0
        self._cache.add(key)
        self._queries += len(request.prompt_token_ids)
        self._hits += cached
        if order == POISON or (order == UNLUCKY and _is_first(request)):
            os._exit(1)
        if order in (LATE, UNSENT):
            await asyncio.sleep(2 if order == LATE else 1)
        for step in range(last + 1):
            await asyncio.sleep(0.05 if order in (SLOW, CUT) else 0.005)
            reason = "length" if step == last else None
            yield TokenDelta(
                request.request_id, (100 + step,), finish_reason=reason, num_cached_tokens=cached
            )
            if request.request_id not in self._running:
                yield TokenDelta(request.request_id, (), finish_reason="cancelled")
                return
            if order == STUCK:
                self._is_stuck = True
                await asyncio.Event().wait()
            if order == FATAL:
                await asyncio.sleep(0.5)  # the token leaves
                os._exit(1)

    async def cancel(self, request_id: str) -> None:
        self._running.discard(request_id)

    async def trim(self, drop_cache: bool = False) -> int:
        if self._config.model.model_id == "narrow":
            raise EngineDeadError("the step loop has ended")
        if drop_cache:
            self._cache.clear()
        before, self._created = self._created, len(self._running) + len(self._cache)
        return (before - self._created) * CHUNK_BYTES

    async def snapshot(self) -> EngineSnapshot:
        memory = MemorySnapshot(
            chunk_bytes=CHUNK_BYTES,
            total=TOTAL,
            free=TOTAL - len(self._running) - len(self._cache),
            kv=len(self._running),
            cached=len(self._cache),
            activation=0,
            guard=0,
            retiring=0,
            warm=0,
            created=self._created,
            kv_tokens=len(self._running),
            driver_calls=1,
        )
        return EngineSnapshot(
            model_id=self._config.model.model_id,
            monotonic_s=0.0,
            num_waiting=0,
            num_waiting_late=max(0, len(self._running) - self._config.scheduler.max_num_seqs),
            num_running=len(self._running),
            num_steps=self._generated,
            num_preemptions=0,
            prompt_tokens=0,
            generated_tokens=self._generated,
            finished=tuple(self._finished.items()),
            last_step_s=0.001,
            memory=memory,
            prefix_queries=self._queries,
            prefix_hits=self._hits,
            order=self._order,
        )

    async def pid(self) -> int:
        return os.getpid()

    async def apply(self, order: Order) -> OrderAnswer:
        self._order = order
        return OrderAnswer("applied", order.epoch, order.revision)

    async def drain(self) -> None:
        while self._requests.num_unclaimed:
            await asyncio.sleep(0.05)

    async def check_health(self) -> None:
        if self._is_stuck:
            raise EngineDeadError("no step has ended for 300 s")

    async def shutdown(self) -> None:
        self._running.clear()


def _is_first(request: GenerateRequest) -> bool:
    """Whether no process on this machine has seen the request before."""
    try:
        (Path(tempfile.gettempdir()) / f"ballonet-{request.request_id}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
