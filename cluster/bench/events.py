"""The server-sent events of one answer, read into its record as they come."""

from __future__ import annotations

from typing import Any

import orjson

from cluster.bench.summary import Record

ERROR_CHARS = 300
_TEXTS = ("content", "reasoning_content", "reasoning")


class EventReader:
    """One stream into its record. One `data:` line an event, as OpenAI sends them.

    Args:
        content_type: of the answer, to name it where it is no stream at all.
    """

    def __init__(self, record: Record, content_type: str) -> None:
        self._record = record
        self._content_type = content_type
        self._rest = b""
        self._usage: int | None = None
        self._any_event = self._done = False

    def feed(self, chunk: bytes, now_s: float) -> None:
        """Bytes as they came, at that time."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            self._line(line, now_s)

    def close(self) -> None:
        """The stream has ended: settle the counts, or say what is missing."""
        self._line(self._rest, self._record.end_s)
        record = self._record
        record.counted = self._usage is not None
        record.output_tokens = len(record.delta_times_s) if self._usage is None else self._usage
        if record.error is not None:
            return
        if not self._any_event:
            record.error = f"the answer is no event stream: its Content-Type is {self._content_type}"
        elif not self._done:
            record.error = f"the stream broke off after {len(record.delta_times_s)} deltas"
        elif not record.delta_times_s and not record.output_tokens:
            record.error = "the stream ended without a token"
        else:
            # All text may be held back to the end, such as bytes that form no character.
            record.delta_times_s = record.delta_times_s or [record.end_s]
            record.finished = True

    def _line(self, line: bytes, now_s: float) -> None:
        if not line.startswith(b"data:"):
            return  # blank lines between events, comments that keep a connection open
        self._any_event = True
        data = line[5:].strip()
        if data == b"[DONE]":
            self._done = True
        elif data:
            self._event(orjson.loads(data), now_s)

    def _event(self, event: Any, now_s: float) -> None:
        record = self._record
        if not isinstance(event, dict):
            record.error = f"the stream has an event that is no object: {str(event)[:ERROR_CHARS]}"
            return
        if error := event.get("error"):
            message = (error.get("message") or error) if isinstance(error, dict) else error
            record.error = f"the stream ended with an error: {str(message)[:ERROR_CHARS]}"
        if usage := event.get("usage"):
            self._usage = _count(usage, "completion_tokens", self._usage)
            record.prompt_tokens = _count(usage, "prompt_tokens", None) or record.prompt_tokens
            details = usage.get("prompt_tokens_details") or {}
            record.cached_tokens = _count(details, "cached_tokens", record.cached_tokens)
        for choice in (event.get("choices") or ())[:1]:
            ends = choice.get("finish_reason") is not None
            if self._has_token(choice, ends):
                record.delta_times_s.append(now_s)
                record.end_s = now_s
            if ends:
                self._done = True
                record.end_s = now_s

    def _has_token(self, choice: dict[str, Any], ends: bool) -> bool:
        """Whether an event carries tokens: text, or the middle of a character that shows no text yet.

        A chat's opening event has a role and no text: servers may send it before there is a token.
        """
        self._record.token_ids += choice.get("token_ids") or ()  # vLLM's, where the request asks for them
        delta = choice.get("delta")
        texts = [choice.get("text")] if delta is None else [delta.get(name) for name in _TEXTS]
        pieces = [text for text in texts if text and isinstance(text, str)]
        self._record.pieces += pieces
        if pieces:
            return True
        if delta is None:
            return not ends
        opens = "role" in delta and not self._record.delta_times_s
        return bool(delta.get("tool_calls")) or not (ends or opens)


def _count(usage: Any, name: str, default: int | None) -> int | None:
    """A count of a `usage` object. Raises ValueError for what is none: sums over it would fail later."""
    value = usage.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"usage has {name} {value!r}")
    return value
