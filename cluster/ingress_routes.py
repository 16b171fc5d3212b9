"""The routes that generate nothing: models, tokens, health, version and the raw state of all engines."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response

from cluster.api import DetokenizeBody, TokenizeBody
from cluster.api_body import parse_body
from cluster.http_errors import describe
from cluster.prompts import tokenize
from cluster.streaming import ServedModel
from engine.errors import RequestError

# A prober gives up after a few seconds; an engine that needs longer to answer is not healthy.
_HEALTH_TIMEOUT_S = 3.0

Models = Mapping[str, ServedModel]


def add_information_routes(app: FastAPI, models: Models) -> None:
    """Register the routes of this file on `app`."""
    routes = _Information(models)
    app.get("/v1/models")(routes.list_models)
    app.get("/v1/models/{model_id:path}")(routes.show_model)
    app.post("/tokenize")(routes.tokenize)
    app.post("/detokenize")(routes.detokenize)
    app.api_route("/health", methods=["GET", "HEAD"])(routes.health)
    app.get("/version")(routes.version)
    app.get("/status")(routes.status)


def find_model(models: Models, model_id: str | None) -> ServedModel:
    """The model of that name; None is the only one there is. Raises RequestError."""
    if model_id is None and len(models) == 1:
        return next(iter(models.values()))
    if model_id is None:
        raise RequestError(
            f"model is required; available: {', '.join(models)}", "model", "missing_required_parameter"
        )
    if model_id not in models:
        raise RequestError(
            f"the model {model_id[:128]!r} does not exist here; available: {', '.join(models)}",
            "model",
            "model_not_found",
        )
    return models[model_id]


async def answer_http_exception(request: Request, error: Exception) -> Response:
    """Answers what the framework itself refuses, such as an unknown path, in OpenAI's shape."""
    described = describe(error)
    if described.status in (404, 405):
        reason = "no such path" if described.status == 404 else "wrong method"
        described = replace(described, message=f"{reason}: {request.method} {request.url.path[:256]}")
    return described.response()


class _Information:
    def __init__(self, models: Models) -> None:
        self._models = models

    async def list_models(self) -> Response:
        """GET /v1/models."""
        data = await asyncio.gather(*(_model_card(model) for model in self._models.values()))
        return _json({"object": "list", "data": data})

    async def show_model(self, model_id: str) -> Response:
        """GET /v1/models/{id}."""
        return _json(await _model_card(find_model(self._models, model_id)))

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize."""
        body = parse_body(await request.body(), TokenizeBody)
        model = find_model(self._models, body.model)
        info, tokenizer = await asyncio.gather(model.info(), model.tokenizer())
        token_ids = await tokenize(body, tokenizer)
        texts = [tokenizer.token_text(token) for token in token_ids] if body.return_token_strs else None
        return _json(
            {
                "count": len(token_ids),
                "max_model_len": info.max_model_len,
                "tokens": token_ids,
                "token_strs": texts,
            }
        )

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize."""
        body = parse_body(await request.body(), DetokenizeBody)
        tokenizer = await find_model(self._models, body.model).tokenizer()
        if any(not 0 <= token < 2**32 for token in body.tokens):
            raise RequestError("tokens must be token ids", "tokens", "invalid_token_id")
        prompt = await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special_tokens=False)
        return _json({"prompt": prompt})

    async def health(self) -> Response:
        """GET /health: 200 only if every model can be served."""
        healthy = await asyncio.gather(*(_is_healthy(model) for model in self._models.values()))
        return _json({"status": "ok"}) if all(healthy) else _json({"status": "unhealthy"}, 503)

    async def version(self) -> Response:
        """GET /version."""
        return _json({"version": _own_version()})

    async def status(self) -> Response:
        """GET /status: raw facts of every engine; verdicts are the reader's."""
        return _json({"models": await asyncio.gather(*(_status(model) for model in self._models.values()))})


async def _model_card(model: ServedModel) -> dict[str, Any]:
    card = {
        "id": model.model_id,
        "object": "model",
        "created": model.created,
        "owned_by": "ballonet",
        "max_model_len": None,
    }
    try:
        card["max_model_len"] = (await model.info()).max_model_len
    except Exception as error:  # a model whose engines are away is still offered, unless this is a bug
        if not describe(error).is_foreseen:
            raise
    return card


async def _is_healthy(model: ServedModel) -> bool:
    try:
        return await asyncio.wait_for(model.is_healthy(), _HEALTH_TIMEOUT_S)
    except Exception:  # whatever keeps an engine from answering, the answer is no
        return False


async def _status(model: ServedModel) -> dict[str, Any]:
    try:
        engines = await model.snapshot()
    except Exception as error:
        described = describe(error)
        if not described.is_foreseen:
            raise
        return {"model_id": model.model_id, "engines": [], "error": described.message}
    return {"model_id": model.model_id, "engines": engines, "error": None}


def _own_version() -> str:
    try:
        return version("ballonet")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0+source"


def _json(body: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")
