"""What happens to every HTTP request before and after its handler: identity, keys, size, last resort.

Plain ASGI, so that a stream passes through without being wrapped or buffered.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.http_errors import HttpError, describe

_logger = logging.getLogger("ballonet.ingress")
_SANE_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
_OPEN_PATHS = frozenset(("/health", "/version"))  # probes have no keys
_KEY_DIGEST = b"ballonet api key"  # what blake2b is personalised with: other digests of a key differ
_KEY_REQUIRED = HttpError(
    401,
    "a valid API key is required, as 'Authorization: Bearer KEY'",
    code="invalid_api_key",
    headers={"WWW-Authenticate": "Bearer"},
)


class RequestIdMiddleware:
    """Gives every request an id and every failure an answer.

    The id is the client's `x-request-id` if that is harmless, else a new one. It stands in
    `request.state.request_id` and in the response's header.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = Headers(scope=scope).get("x-request-id", "")
        request_id = asked if _SANE_ID.fullmatch(asked) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:  # the last line of defence: no client is left without an answer
            described = describe_and_log(error, request_id)
            if not has_started:
                await described.response()(scope, receive, send_with_id)


class ApiKeyMiddleware:
    """Refuses requests without one of the configured keys as bearer token; without any key lets all pass.

    What the key was stands in `request.state`, the key itself goes no further: `api_key_digest`, empty if
    there was none that is configured, and `is_admin`.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str], admin_api_keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in api_keys]
        self._admin_keys = [key.encode() for key in admin_api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        token = _bearer(Headers(scope=scope))
        is_admin = _is_among(token, self._admin_keys)
        is_known = _is_among(token, self._keys) or is_admin
        if self._keys and not is_known and not _is_open(scope):
            await _KEY_REQUIRED.response()(scope, receive, send)
            return
        digest = hashlib.blake2b(token, digest_size=32, person=_KEY_DIGEST).digest() if is_known else b""
        scope.setdefault("state", {}).update(api_key_digest=digest, is_admin=is_admin)
        await self._app(scope, receive, send)


class BodyLimitMiddleware:
    """Refuses bodies of more than `max_body_bytes`, announced or not."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > self._max_bytes:
            await describe(self._too_large()).response()(scope, receive, send)
            return
        num_bytes = 0

        async def receive_counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise self._too_large()
            return message

        await self._app(scope, receive_counted, send)

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"the request body is larger than {self._max_bytes} bytes")


def _is_open(scope: Scope) -> bool:
    return str(scope["path"]).removeprefix(scope.get("root_path", "").rstrip("/")) in _OPEN_PATHS


def _bearer(headers: Headers) -> bytes:
    """The bearer token's bytes as they came; empty if there is none."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return given.strip().encode("latin-1") if scheme.lower() == "bearer" else b""


def _is_among(token: bytes, keys: Sequence[bytes]) -> bool:
    # All keys are compared, each in constant time: the answer's delay tells nothing about them.
    return sum([hmac.compare_digest(token, key) for key in keys]) > 0


def describe_and_log(error: Exception, request_id: str) -> HttpError:
    """What to tell the client. The log hears of the server's own failures, once each.

    Those that nobody foresaw come with their traceback.
    """
    described = describe(error)
    if not described.is_foreseen:
        _logger.error("request %s failed", request_id, exc_info=error)
    elif described.status >= 500:
        _logger.warning("request %s failed: %s", request_id, described.message)
    return described
