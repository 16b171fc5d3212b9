"""The routes that change the state of engines. They take an admin key, and are closed without any.

Not part of OpenAI's API. A tenant's key does not open them: who can empty the prefix cache, or have memory
given back that is needed again at once, slows every other tenant down.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response

from cluster.api import TrimBody
from cluster.api_body import parse_body
from cluster.http_errors import HttpError
from cluster.ingress_routes import Models, find_model
from cluster.streaming import ServedModel
from engine.errors import BallonetError, RequestError

_CLOSED = HttpError(
    403,
    "this route takes an admin key; ingress.admin_api_keys_env names them, and without any it is closed",
    code="admin_key_required",
)


def add_admin_routes(app: FastAPI, models: Models) -> None:
    """Register the routes of this file on `app`."""

    async def trim(request: Request) -> Response:
        return await _trim(request, models)

    app.post("/trim")(trim)


async def _trim(request: Request, models: Models) -> Response:
    """POST /trim: every engine, or those of one model, gives the memory it does not use back.

    503 if one of them did not; the body says which gave what in either case.
    """
    if not request.state.is_admin:
        return _CLOSED.response()
    if request.query_params:
        raise RequestError("/trim takes its parameters as a JSON body, not in the address")
    body = parse_body(await request.body() or b"{}", TrimBody)
    chosen = list(models.values()) if body.model is None else [find_model(models, body.model)]
    answers = await asyncio.gather(*(_trim_model(model, body.drop_cache) for model in chosen))
    engines = [engine for answer in answers for engine in answer["engines"]]
    failed = sum(engine["error"] is not None for engine in engines)
    silent = [answer["model_id"] for answer in answers if not answer["engines"]]
    told: dict[str, Any] = {"models": answers}
    if not failed and not silent:
        return _json(told, 200)
    reason = (
        f"no engine of {', '.join(silent)} answers"
        if silent
        else f"{failed} of {len(engines)} engines failed"
    )
    return _json(told | HttpError(503, reason, code="engine_unavailable").body, 503)


async def _trim_model(model: ServedModel, drop_cache: bool) -> dict[str, Any]:
    engines = [
        {"released_bytes": None, "error": str(given)}
        if isinstance(given, BallonetError)
        else {"released_bytes": given, "error": None}
        for given in await model.trim(drop_cache)
    ]
    return {"model_id": model.model_id, "engines": engines}


def _json(body: Mapping[str, Any], status: int) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")
