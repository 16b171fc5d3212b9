"""Reads what of a request needs more than a type: prompts, messages, stop strings, objectives in headers.

Each reader takes what the client sent and returns one shape, or raises RequestError naming the part at fault.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers

from cluster.api_body import refuse_unless_neutral
from engine.errors import RequestError

MAX_SEQUENCES = 256  # prompts times n of one request
MAX_SESSION_CHARS = 256  # it travels with every request
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 512

# float() alone would also take "1_000".
_NUMBER = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class RequestSlo:
    """What one request is to be promised, in seconds; None is its model's own objective.

    Attributes:
        ttft_s: from its arrival to its first token.
        tpot_s: from a token to the next, on average.
        unpaced: tokens are wanted as soon as they exist, also ahead of that.
        session_id: of the conversation, if it tells; any text.
    """

    ttft_s: float | None
    tpot_s: float | None
    unpaced: bool
    session_id: str = ""


def read_slo(headers: Headers) -> RequestSlo:
    """The objectives a request brings, in the headers that llm-d and the Kubernetes inference gateway use;
    in `x-slo-deposit` whether tokens ahead of them may be held back, and in `x-session-id` which conversation
    it belongs to.
    """
    return RequestSlo(
        _read_ms(headers, "x-slo-ttft-ms"),
        _read_ms(headers, "x-slo-tpot-ms"),
        not _read_switch(headers, "x-slo-deposit"),
        headers.get("x-session-id", "")[:MAX_SESSION_CHARS],
    )


def read_stop(value: Any) -> list[str]:
    """A string or a list of strings, as a list."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise RequestError("stop must be a string or a list of strings", "stop", "invalid_type")
    if len(stops) > MAX_STOP_STRINGS:
        raise RequestError(f"stop takes at most {MAX_STOP_STRINGS} strings, not {len(stops)}", "stop")
    if not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise RequestError(f"each stop string must have 1 to {MAX_STOP_CHARS} characters", "stop")
    return stops


def read_prompts(value: Any) -> list[Any]:
    """A string, a list of strings, token ids or a list of lists of them, as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return [value]
        if len(value) > MAX_SEQUENCES:
            raise RequestError(f"prompt takes at most {MAX_SEQUENCES} prompts, not {len(value)}", "prompt")
        if all(isinstance(item, str) for item in value):
            return value
        if all(isinstance(item, list) and all(type(token) is int for token in item) for item in value):
            return value
    raise RequestError(
        "prompt must be a string, a list of strings, a list of token ids or a list of such lists; not empty",
        "prompt",
        "invalid_type",
    )


def read_messages(value: Any) -> list[dict[str, str]]:
    """A conversation as chat templates want it."""
    if not isinstance(value, list) or not value:
        raise RequestError("messages must be a list with at least one message", "messages")
    return [_message(item, f"messages[{index}]") for index, item in enumerate(value)]


def _read_ms(headers: Headers, name: str) -> float | None:
    """Milliseconds as seconds; None without such a header."""
    value = _sent(headers, name)
    if value is None:
        return None
    seconds = float(value) / 1000 if _NUMBER.fullmatch(value) else 0.0
    if not 0.0 < seconds < math.inf:
        raise RequestError(f"{name} must be a positive number of milliseconds, not {value[:64]!r}", name)
    return seconds


def _read_switch(headers: Headers, name: str) -> bool:
    """`on` or `off`; on without such a header."""
    value = _sent(headers, name)
    if value is not None and value.lower() not in ("on", "off"):
        raise RequestError(f"{name} must be on or off, not {value[:64]!r}", name)
    return value is None or value.lower() == "on"


def _sent(headers: Headers, name: str) -> str | None:
    """A header's value. Sent twice it is a list, as proxies write it: no number and no word."""
    given = headers.getlist(name)
    return ", ".join(given).strip() if given else None


def _message(value: Any, path: str) -> dict[str, str]:
    """One message as a chat template wants it: role, content as one string, perhaps a name."""
    if not isinstance(value, dict):
        raise RequestError(f"{path} must be an object with role and content", path, "invalid_type")
    role = value.get("role")
    if role not in ("system", "developer", "user", "assistant"):
        raise RequestError(
            f"{path}.role must be system, developer, user or assistant, not {str(role)[:64]!r}; "
            "tools are not supported",
            f"{path}.role",
        )
    for name, extra in value.items():
        if name not in ("role", "content", "name"):
            refuse_unless_neutral(f"{path}.{name[:64]}", extra, ([], ""))
    # Templates were trained with `system`; `developer` is OpenAI's newer name for it.
    message = {"role": "system" if role == "developer" else role}
    message["content"] = _content(value.get("content"), f"{path}.content")
    if value.get("name") is not None:
        message["name"] = str(value["name"])
    return message


def _content(value: Any, path: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise RequestError(f"{path} must be a string or a list of text parts", path, "invalid_type")
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RequestError(
                f"{path}[{index}] must be a text part, not {str(kind)[:64]!r}: this server reads text only",
                f"{path}[{index}]",
            )
        texts.append(part["text"])
    return "\n".join(texts)
