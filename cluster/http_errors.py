"""Every error as OpenAI's clients expect it: a status, a body and sometimes a header.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

Owns the mapping from exceptions to answers, also for exceptions that crossed a process boundary and came
back inside another one. Imports no Ray: what Ray wraps is found by looking, not by type.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from engine.errors import BallonetError, EngineDeadError, OverloadedError, RequestError

CLIENT_LEFT = 499  # nginx's number; nobody receives it, but it shows in metrics and logs

# Ray's own failures, by class name: the engine's process is gone, or Serve refused to queue one more.
_RAY_UNAVAILABLE = {
    "ActorDiedError",
    "ActorUnavailableError",
    "DeploymentUnavailableError",
    "NodeDiedError",
    "RayActorError",
    "WorkerCrashedError",
}
_RAY_OVERLOADED = {"BackPressureError"}
_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
}


class ClientDisconnectedError(BallonetError):
    """The client went away before its answer was ready."""


@dataclass(frozen=True, slots=True)
class HttpError:
    """An error as it goes over the wire."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    is_foreseen: bool = True

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole answer."""
        return Response(
            orjson.dumps(self.body), self.status, headers=self.headers, media_type="application/json"
        )


def describe(error: BaseException) -> HttpError:
    """What a client is told about `error`.

    Errors nobody foresaw keep their message to themselves: it may quote a prompt or a path.
    """
    if isinstance(error, HTTPException):
        return HttpError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    if isinstance(error, ClientDisconnect):
        return HttpError(CLIENT_LEFT, "the client left before it had sent its request")
    if isinstance(error, TimeoutError):
        return HttpError(408, "the request took longer than this server allows", code="request_timeout")
    known = find_ballonet_error(error)
    if isinstance(known, RequestError):
        status = 404 if known.code == "model_not_found" else 400
        return HttpError(status, known.message, known.param, known.code)
    if isinstance(known, OverloadedError):
        return _overloaded(known.message, known.retry_after_s)
    if isinstance(known, EngineDeadError):
        return HttpError(503, f"no engine can serve this now: {known}", code="engine_unavailable")
    if isinstance(known, ClientDisconnectedError):
        return HttpError(CLIENT_LEFT, str(known))
    if known is not None:
        return HttpError(500, str(known), code="engine_error")
    return _describe_unknown(error)


def find_ballonet_error(error: BaseException) -> BallonetError | None:
    """The error raised on purpose inside `error`, if there is one.

    Ray keeps what an actor raised in `.cause` of a wrapper that may itself claim to be of the same
    class, without its fields: so a wrapper is opened before it is believed.
    """
    current: BaseException | None = error
    seen: set[int] = set()
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        wrapped = getattr(current, "cause", None)
        if isinstance(wrapped, BaseException):
            current = wrapped
        elif isinstance(current, BallonetError):
            return current
        else:
            current = current.__cause__
    return None


def _describe_unknown(error: BaseException) -> HttpError:
    names = {base.__name__ for base in type(error).__mro__ if base.__module__.split(".")[0] == "ray"}
    if names & _RAY_OVERLOADED:
        return _overloaded("every engine's queue is full", 1.0)
    if names & _RAY_UNAVAILABLE:
        return HttpError(503, "no engine can serve this now", code="engine_unavailable")
    return HttpError(500, "the server failed; its log has the cause under this request id", is_foreseen=False)


def _overloaded(message: str, retry_after_s: float) -> HttpError:
    headers = {"Retry-After": str(max(1, math.ceil(retry_after_s)))}
    return HttpError(429, message, code="overloaded", headers=headers)
