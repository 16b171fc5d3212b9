"""A small client of the HTTP API: what the command line needs, over the same wire as everybody else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from engine.control import HostSnapshot, Order
from engine.errors import BallonetError
from engine.messages import EngineSnapshot, MemorySnapshot

_CONNECT_S = 5.0
_READ_S = 600.0  # a long prompt on a slow machine sends nothing for minutes
_VERSION_S = 5.0  # a version is a nicety

Message = Mapping[str, str]


class ClientError(BallonetError):
    """The server cannot be reached or refused; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One chat completion as the client saw it.

    Attributes:
        cached_tokens: those of the prompt that the server did not compute; 0 if it does not tell.
        ttft_s: from sending to the first piece of text.
        total_s: from sending to the end of the stream.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    ttft_s: float
    total_s: float
    cached_tokens: int = 0

    @property
    def tokens_per_s(self) -> float:
        """After the first token; 0 when there is only one."""
        if self.completion_tokens < 2 or self.total_s <= self.ttft_s:
            return 0.0
        return (self.completion_tokens - 1) / (self.total_s - self.ttft_s)


class Client:
    """Talks to one server. Every method raises ClientError.

    Args:
        headers: sent with every request beside the key.
    """

    def __init__(
        self, url: str, api_key: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        key = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(
            base_url=url.rstrip("/"),
            headers={**key, **(headers or {})},
            timeout=httpx.Timeout(_READ_S, connect=_CONNECT_S),
        )

    def models(self) -> list[str]:
        """Ids of the models that the server offers."""
        return [model["id"] for model in self._get("/v1/models")["data"]]

    def version(self) -> str:
        """The server's own version, if it tells it within a few seconds."""
        return str(self._get("/version", _VERSION_S)["version"])

    def status(self) -> dict[str, list[EngineSnapshot]]:
        """Snapshots of all engines by model id."""
        answer = self._get("/status")
        return {
            model["model_id"]: [_snapshot(engine) for engine in model["engines"]]
            for model in answer["models"]
        }

    def chat(
        self,
        model: str,
        messages: Sequence[Message],
        on_text: Callable[[str], None],
        **sampling: float | None,
    ) -> Answer:
        """One streamed completion; `on_text` gets each piece of text as it comes.

        `sampling` are fields of the request such as `temperature`; None leaves one out.
        """
        body: dict[str, Any] = {
            "model": model,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        body |= {name: value for name, value in sampling.items() if value is not None}
        started = time.monotonic()
        first_s, pieces, reason = None, [], ""
        usage: dict[str, Any] = {"prompt_tokens": 0, "completion_tokens": 0}
        for event in self._events("/v1/chat/completions", body):
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                reason = choice.get("finish_reason") or reason
                if text := choice["delta"].get("content"):
                    first_s = first_s or time.monotonic() - started
                    pieces.append(text)
                    on_text(text)
        total_s = time.monotonic() - started
        return Answer(
            text="".join(pieces),
            finish_reason=reason,
            prompt_tokens=usage["prompt_tokens"],
            completion_tokens=usage["completion_tokens"],
            ttft_s=first_s or total_s,
            total_s=total_s,
            cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        )

    def trim(self, model: str | None = None, *, drop_cache: bool = False) -> dict[str, list[int | str]]:
        """Have the engines of one model or of all give memory back; by model id the bytes that each gave, or
        why it did not."""
        response = self._send("POST", "/trim", json={"model": model, "drop_cache": drop_cache})
        try:
            models = response.json()["models"]  # beside an error too, which some engines may have had
        except (ValueError, KeyError, TypeError):
            raise _refused(response) from None
        return {
            model["model_id"]: [engine["error"] or engine["released_bytes"] for engine in model["engines"]]
            for model in models
        }

    def _get(self, path: str, timeout_s: float = _READ_S) -> Any:
        response = self._send("GET", path, timeout=httpx.Timeout(timeout_s, connect=_CONNECT_S))
        if response.is_error:
            raise _refused(response)
        return response.json()

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            return self._http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _events(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        has_ended = False
        try:
            with self._http.stream("POST", path, json=body) as response:
                if response.is_error:
                    response.read()
                    raise _refused(response)
                for line in response.iter_lines():
                    data = line.removeprefix("data: ")
                    has_ended = has_ended or data == "[DONE]"
                    if line.startswith("data: ") and not has_ended:
                        yield _checked(json.loads(data))
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if not has_ended:
            raise ClientError("the server closed the stream before its end")

    def _unreachable(self, error: httpx.HTTPError) -> ClientError:
        return ClientError(f"no answer from {self._http.base_url}: {error or type(error).__name__}")


def _checked(event: dict[str, Any]) -> dict[str, Any]:
    if "error" in event:
        raise ClientError(str(event["error"].get("message", event["error"])))
    return event


def _refused(response: httpx.Response) -> ClientError:
    try:
        reason = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        reason = response.text.strip()[:200] or response.reason_phrase
    return ClientError(f"HTTP {response.status_code}: {reason}")


def _snapshot(data: Mapping[str, Any]) -> EngineSnapshot:
    fields = dict(data)
    fields["memory"] = MemorySnapshot(**fields["memory"])
    for name, kind in (("order", Order), ("host", HostSnapshot)):
        fields[name] = kind(**fields[name]) if fields.get(name) is not None else None
    for name in ("finished", "decisions"):
        fields[name] = tuple((what, count) for what, count in fields[name])
    return EngineSnapshot(**fields)
