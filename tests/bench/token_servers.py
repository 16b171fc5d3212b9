"""Three servers that stream the same tokens: the subjects of `tests.bench.token_path`.

`bare` is FastAPI under uvicorn alone (`python -m tests.bench.token_servers PORT STEP_S`), `ours` the whole
application with an engine actor whose tokens come from arithmetic, `plain` what Ray Serve offers by itself:
a FastAPI ingress that reads a replica's generator through a streaming handle.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import ray
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from ray import serve
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cluster import app as ours
from cluster.config import ServingArgs, validate
from engine.config import EngineConfig
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

MODEL, VOCAB = "bench", 200
_CONCURRENT = 4096
_STEP_NAME = "step:"  # the engine's pace travels as its model's source


class GeneratedEngine:
    """Shaped like `engine.actor.EngineActor`. Makes a token a step for each request, a new one's at once."""

    def __init__(self, config: EngineConfig) -> None:
        self._step_s = float(config.model.source.removeprefix(_STEP_NAME))
        self._left: dict[str, int] = {}
        self._num_steps = 0
        self._sender = TokenSender(self._cancel)
        self._requests = OpenRequests(self._sender, self._submit, self._cancel)
        self._loop: asyncio.Task[None] | None = None

    async def info(self) -> EngineInfo:
        return EngineInfo(MODEL, "cpu", "float32", 1 << 16, VOCAB, (0,), 1 << 20, 1 << 20, 16, 1, 0.0)

    async def door(self) -> EngineAddress:
        self._door = RequestDoor(ray.util.get_node_ip_address(), self._requests)
        return self._door.door

    async def generate(self, request: GenerateRequest, reply_to: ReplyTo) -> None:
        await self._requests.run(request, reply_to)

    def _submit(self, request: GenerateRequest) -> None:
        self._loop = self._loop or asyncio.create_task(self._step_forever())
        self._left[request.request_id] = request.sampling.max_tokens
        self._step([request.request_id])

    def _cancel(self, request_id: str) -> None:
        self._left.pop(request_id, None)

    async def _step_forever(self) -> None:
        due_s = time.perf_counter()
        while True:
            due_s = max(due_s + self._step_s, time.perf_counter())
            await asyncio.sleep(due_s - time.perf_counter())
            self._step(list(self._left))

    def _step(self, request_ids: list[str]) -> None:
        self._num_steps += 1
        deltas = []
        for request_id in request_ids:
            self._left[request_id] -= 1
            is_last = not self._left[request_id]
            if is_last:
                del self._left[request_id]
            token = self._num_steps % VOCAB
            deltas.append(TokenDelta(request_id, (token,), finish_reason="length" if is_last else None))
        self._sender.put(deltas)

    async def cancel(self, request_id: str) -> None:
        self._cancel(request_id)

    async def drain(self) -> None:
        pass

    async def snapshot(self) -> EngineSnapshot:
        memory = MemorySnapshot(1 << 20, 1, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0)
        running = len(self._left)
        return EngineSnapshot(
            MODEL, time.monotonic(), 0, running, self._num_steps, 0, 0, 0, (), self._step_s, memory
        )

    async def check_health(self) -> None:
        pass

    async def shutdown(self) -> None:
        self._sender.shut()


async def tokens(num_tokens: int, step_s: float) -> AsyncIterator[int]:
    """The engine as a generator: the first token at once, the others a step apart."""
    due_s = time.perf_counter()
    for index in range(num_tokens):
        yield index % VOCAB
        due_s = max(due_s + step_s, time.perf_counter())
        if index < num_tokens - 1:
            await asyncio.sleep(due_s - time.perf_counter())


def event(token: int, finish_reason: str | None) -> bytes:
    """One token as a chunk of OpenAI's completions."""
    choice = {"index": 0, "text": f" word{token}", "logprobs": None, "finish_reason": finish_reason}
    chunk = {
        "id": "cmpl-0",
        "object": "text_completion",
        "created": 1_700_000_000,
        "model": MODEL,
        "choices": [choice],
    }
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


async def events(source: AsyncIterator[int], num_tokens: int) -> AsyncIterator[bytes]:
    """A whole answer."""
    seen = 0
    async for token in source:
        seen += 1
        yield event(token, "length" if seen == num_tokens else None)
    yield b"data: [DONE]\n\n"


def bare_app(step_s: float) -> FastAPI:
    """FastAPI around the generator."""
    app = FastAPI()

    @app.post("/v1/completions")
    async def complete(request: Request) -> StreamingResponse:
        count = orjson.loads(await request.body())["max_tokens"]
        return StreamingResponse(events(tokens(count, step_s), count), media_type="text/event-stream")

    return app


class PlainReplica:
    """The engine as a deployment."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s

    async def generate(self, num_tokens: int) -> AsyncIterator[int]:
        """One token a yield."""
        async for token in tokens(num_tokens, self._step_s):
            yield token


def plain_app() -> FastAPI:
    """A front around the deployment's streaming handle; Serve calls this in the ingress replica."""
    app = FastAPI()
    generate = serve.get_deployment_handle("PlainReplica").options(method_name="generate", stream=True)

    @app.post("/v1/completions")
    async def complete(request: Request) -> StreamingResponse:
        count = orjson.loads(await request.body())["max_tokens"]
        return StreamingResponse(events(generate.remote(count), count), media_type="text/event-stream")

    return app


def plain(step_s: float) -> serve.Application:
    """Ray Serve by itself."""
    options = {"max_ongoing_requests": _CONCURRENT, "ray_actor_options": {"num_cpus": 0.1}}
    replica = serve.deployment(PlainReplica).options(name="PlainReplica", **options)
    ingress = serve.deployment(serve.ingress(plain_app)()).options(name="PlainIngress", **options)
    return ingress.bind(replica.bind(step_s))


def ours_on(step_s: float, folder: Path, num_ingresses: int) -> serve.Application:
    """The whole application, with the generated engine; `folder` is where its tokenizer goes."""
    tokenizer = Tokenizer(models.WordLevel({f"▁word{n}": n for n in range(VOCAB)}, unk_token="▁word0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(folder / "tokenizer.json"))
    llm = {
        "model_loading_config": {
            "model_id": MODEL,
            "model_source": f"{_STEP_NAME}{step_s}",
            "tokenizer_source": str(folder),
        },
        "engine_kwargs": {"device": "cpu"},
    }
    args = {"llm_configs": [llm], "ingress": {"num_replicas": num_ingresses}}
    return ours.build_application(validate(ServingArgs, args), GeneratedEngine)


if __name__ == "__main__":
    uvicorn.run(bare_app(float(sys.argv[2])), port=int(sys.argv[1]), log_level="warning")
