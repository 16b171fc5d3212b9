"""Exceptions as HTTP answers, also those that Ray brought from another process."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from cluster.http_errors import describe, find_ballonet_error
from engine.errors import BallonetError, EngineDeadError, OverloadedError, RequestError


def wrapped_by_ray(cause: Exception) -> Exception:
    """What a caller gets when an actor raised `cause`."""
    wrapper = RayTaskError("generate", "Traceback ...", cause)
    return wrapper.as_instanceof_cause()


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        RequestError("wrong", "top_p", "code"),
        OverloadedError("full", 3.5),
        EngineDeadError("gone"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_are_found_inside_what_ray_wraps_around_them(error: BallonetError) -> None:
    wrapped = wrapped_by_ray(error)
    assert wrapped is not error
    assert find_ballonet_error(wrapped) is error
    assert find_ballonet_error(wrapped_by_ray(wrapped)) is error
    assert find_ballonet_error(raised_from(RuntimeError("outer"), wrapped)) is error
    assert describe(wrapped) == describe(error)


def test_the_outermost_of_our_own_errors_counts() -> None:
    dead = raised_from(EngineDeadError("gone"), RequestError("inner"))
    assert find_ballonet_error(dead) is dead


def test_cycles_end() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert find_ballonet_error(first) is None


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (RequestError("wrong"), 400, "invalid_request_error"),
        (RequestError("which?", "model", "model_not_found"), 404, "not_found_error"),
        (OverloadedError("full"), 429, "rate_limit_error"),
        (EngineDeadError("gone"), 503, "server_error"),
        (BallonetError("other"), 500, "server_error"),
        (TimeoutError(), 408, "timeout_error"),
        (HTTPException(413, "large"), 413, "invalid_request_error"),
        (ClientDisconnect(), 499, "invalid_request_error"),
        (ActorDiedError(), 503, "server_error"),
        (BackPressureError(num_queued_requests=5, max_queued_requests=5), 429, "rate_limit_error"),
        (ValueError("unforeseen"), 500, "server_error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_statuses(error: Exception, status: int, kind: str) -> None:
    described = describe(error)
    assert described.status == status
    assert described.body["error"]["type"] == kind
    assert described.is_foreseen == (not isinstance(error, ValueError))
    assert "unforeseen" not in described.message


def test_retry_after_is_whole_seconds_and_never_zero() -> None:
    assert describe(OverloadedError("full", 0.0)).headers == {"Retry-After": "1"}
    assert describe(OverloadedError("full", 2.01)).headers == {"Retry-After": "3"}
