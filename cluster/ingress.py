"""The OpenAI-compatible HTTP front: one FastAPI application over any number of models.

Owns the order of steps within a request. Bodies are `cluster.api`'s, answers `cluster.api_responses`',
errors `cluster.http_errors`', the run of the choices `cluster.generation`'s, and the routes that generate
nothing `cluster.ingress_routes`' and `cluster.ingress_admin`'s. Knows no Ray: models come as
`cluster.streaming.ServedModel`.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from cluster.api import ChatBody, CompletionBody, GenerationBody, resolve_max_tokens
from cluster.api_body import parse_body
from cluster.api_inputs import RequestSlo, read_slo
from cluster.api_responses import ChatWriter, CompletionWriter, Json, ResponseWriter
from cluster.config_values import DEFAULT_MAX_BODY_BYTES
from cluster.event_stream import EventStreamResponse, until_disconnect
from cluster.generation import Generation
from cluster.http_errors import describe
from cluster.http_middleware import (
    ApiKeyMiddleware,
    BodyLimitMiddleware,
    RequestIdMiddleware,
    describe_and_log,
)
from cluster.ingress_admin import add_admin_routes
from cluster.ingress_routes import add_information_routes, answer_http_exception, find_model
from cluster.prompts import TokenIds, chat_prompt, completion_prompts
from cluster.streaming import NullObserver, RequestObserver, ServedModel
from cluster.tokenizer import Tokenizer
from engine.messages import EngineInfo, GenerateRequest


@dataclass(frozen=True, slots=True)
class IngressConfig:
    """Limits and keys of the front.

    Attributes:
        api_keys: accepted bearer tokens; none leaves the server open.
        admin_api_keys: those that may change the state of engines too; none closes the routes that do.
        salts_by_api_key: whether requests of different keys share no cached prefix.
        request_timeout_s: from the arrival of a request to its last token; None for no limit.
    """

    api_keys: tuple[str, ...] = ()
    admin_api_keys: tuple[str, ...] = ()
    salts_by_api_key: bool = False
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES
    request_timeout_s: float | None = None


def create_app(
    models: Mapping[str, ServedModel],
    config: IngressConfig | None = None,
    observer: RequestObserver | None = None,
) -> FastAPI:
    """The application that serves `models`, by the names clients use."""
    config = config or IngressConfig()
    front = _Front(models, config, observer or NullObserver())
    app = FastAPI(title="Ballonet", openapi_url=None)
    app.add_exception_handler(HTTPException, answer_http_exception)
    app.add_middleware(BodyLimitMiddleware, max_body_bytes=config.max_body_bytes)
    app.add_middleware(ApiKeyMiddleware, api_keys=config.api_keys, admin_api_keys=config.admin_api_keys)
    app.add_middleware(RequestIdMiddleware)
    app.post("/v1/chat/completions")(front.chat)
    app.post("/v1/completions")(front.complete)
    add_information_routes(app, models)
    add_admin_routes(app, models)
    return app


@dataclass(frozen=True, slots=True)
class _Call:
    """One request on its way: what the steps hand on to each other.

    Attributes:
        api_key_digest: of the key that sent it, if prefixes are not shared between keys; else empty.
    """

    request_id: str
    api_key_digest: bytes
    slo: RequestSlo
    arrived_s: float
    deadline_s: float | None
    model: ServedModel
    info: EngineInfo
    tokenizer: Tokenizer

    def head(self, prefix: str, kind: str) -> Json:
        """Fields that every object of the answer repeats."""
        return {
            "id": f"{prefix}-{self.request_id}",
            "object": kind,
            "created": int(time.time()),
            "model": self.model.model_id,
        }


GenerationT = TypeVar("GenerationT", bound=GenerationBody)
Answer = Callable[[_Call, GenerationT], Coroutine[Any, Any, Response]]


class _Front:
    """The two routes that generate."""

    def __init__(
        self, models: Mapping[str, ServedModel], config: IngressConfig, observer: RequestObserver
    ) -> None:
        self._models = models
        self._config = config
        self._observer = observer

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._serve(request, ChatBody, self._answer_chat)

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._serve(request, CompletionBody, self._answer_completion)

    async def _serve(
        self, request: Request, body_type: type[GenerationT], answer: Answer[GenerationT]
    ) -> Response:
        arrived_s = time.perf_counter()
        model_id, state = "", request.state
        limit_s = self._config.request_timeout_s
        deadline_s = None if limit_s is None else asyncio.get_running_loop().time() + limit_s
        try:
            async with asyncio.timeout_at(deadline_s):
                body = parse_body(await request.body(), body_type)
                model = find_model(self._models, body.model)
                model_id = model.model_id
                body.check()
                slo = read_slo(request.headers)
                info, tokenizer = await model.info(), await model.tokenizer()
                key = state.api_key_digest if self._config.salts_by_api_key else b""
                call = _Call(state.request_id, key, slo, arrived_s, deadline_s, model, info, tokenizer)
                return await until_disconnect(request.receive, answer(call, body))
        except Exception as error:
            self._observer.request_rejected(model_id, describe(error).status)
            raise

    async def _answer_chat(self, call: _Call, body: ChatBody) -> Response:
        prompt = await chat_prompt(body, call.tokenizer, call.info)
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        writer = ChatWriter(call.head("chatcmpl", kind), call.tokenizer, includes_usage=body.includes_usage)
        return await self._generate(call, body, [prompt], writer)

    async def _answer_completion(self, call: _Call, body: CompletionBody) -> Response:
        prompts = await completion_prompts(body, call.tokenizer, call.info)
        writer = CompletionWriter(
            call.head("cmpl", "text_completion"),
            call.tokenizer,
            includes_usage=body.includes_usage,
            echoes=_echoes(body, prompts, call.tokenizer),
        )
        return await self._generate(call, body, prompts, writer)

    async def _generate(
        self, call: _Call, body: GenerationBody, prompts: Sequence[TokenIds], writer: ResponseWriter
    ) -> Response:
        generation = Generation(
            model=call.model,
            tokenizer=call.tokenizer,
            requests=_engine_requests(call, body, prompts),
            num_choices=body.n,
            options=body.text_options(),
            observer=self._observer,
            arrived_s=call.arrived_s,
        )
        if body.stream:
            events = _events(generation, writer, body.includes_usage)
            # The status waits for the first token, so that what fails before it fails with a status.
            first = await anext(events)
            return EventStreamResponse(
                first, events, partial(describe_and_log, request_id=call.request_id), call.deadline_s
            )
        choices = await generation.collect()
        return Response(writer.whole(choices, generation.usage), media_type="application/json")


async def _events(
    generation: Generation, writer: ResponseWriter, includes_usage: bool
) -> AsyncGenerator[bytes, None]:
    async with aclosing(generation.deltas()) as deltas:
        async for index, delta in deltas:
            yield writer.events(index, delta)
    if includes_usage:
        yield writer.usage_event(generation.usage)


def _engine_requests(call: _Call, body: GenerationBody, prompts: Sequence[TokenIds]) -> list[GenerateRequest]:
    """One request a choice, all choices of the first prompt first."""
    unique = f"{call.request_id}-{uuid.uuid4().hex[:8]}"  # clients may repeat their x-request-id
    salt = _cache_salt(call.api_key_digest, body.cache_salt)
    requests: list[GenerateRequest] = []
    for token_ids in prompts:
        max_tokens = resolve_max_tokens(body, len(token_ids), call.info)
        for choice in range(body.n):
            sampling = body.sampling(max_tokens, call.info.vocab_size, choice)
            requests.append(
                GenerateRequest(
                    request_id=f"{unique}-{len(requests)}",
                    prompt_token_ids=token_ids,
                    sampling=sampling,
                    cache_salt=salt,
                    ttft_slo_s=call.slo.ttft_s,
                    tpot_slo_s=call.slo.tpot_s,
                    priority=body.priority,
                    unpaced=call.slo.unpaced,
                    session_id=call.slo.session_id,
                )
            )
    return requests


def _cache_salt(api_key_digest: bytes, asked: str | None) -> str:
    """One salt of both, "" if there is neither. A digest: what a client sends as a salt may be a secret."""
    if asked is None and not api_key_digest:
        return ""
    return hashlib.blake2b((asked or "").encode(), key=api_key_digest, digest_size=32).hexdigest()


def _echoes(body: CompletionBody, prompts: Sequence[TokenIds], tokenizer: Tokenizer) -> list[str]:
    if not body.echo:
        return []
    texts = [
        prompt if isinstance(prompt, str) else tokenizer.decode(token_ids)
        for prompt, token_ids in zip(body.prompt, prompts, strict=True)
    ]
    return [text for text in texts for _ in range(body.n)]
