"""The answers of the OpenAI-compatible API: whole objects and the events of a stream.

One writer a request; it knows shapes, not where the tokens come from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import orjson

from cluster.generation import Choice, Usage
from cluster.http_errors import HttpError
from cluster.text_stream import TextDelta, TokenEntry
from cluster.tokenizer import Tokenizer

DONE_EVENT = b"data: [DONE]\n\n"
# JSON has no minus infinity; clients expect this number for "impossible", as OpenAI answers it.
_LOWEST_LOGPROB = -9999.0

Json = dict[str, Any]


def error_event(error: HttpError) -> bytes:
    """An error in the middle of a stream, whose status has long been sent."""
    return _event(error.body)


def usage_body(usage: Usage) -> Json:
    """OpenAI's usage object. The details are there also when nothing was cached: a missing count and a
    count of 0 are told apart by those who look for why nothing was."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


class ResponseWriter(ABC):
    """Builds one request's answer, whole or in events."""

    def __init__(self, head: Json, tokenizer: Tokenizer, *, includes_usage: bool) -> None:
        """`head` holds the fields that every chunk repeats: id, object, created, model."""
        self._head = head
        self._tokenizer = tokenizer
        self._usage: Json = {"usage": None} if includes_usage else {}
        self._begun: set[int] = set()

    def events(self, index: int, delta: TextDelta) -> bytes:
        """The event for what choice `index` gained, after the one that opens the choice."""
        body = {**self._head, "choices": [self._chunk(index, delta)], **self._usage}
        if index in self._begun:
            return _event(body)
        self._begun.add(index)
        opening = self._opening(index)
        if opening is None:
            return _event(body)
        return _event({**self._head, "choices": [opening], **self._usage}) + _event(body)

    def usage_event(self, usage: Usage) -> bytes:
        """The last event of a stream that includes usage."""
        return _event({**self._head, "choices": [], "usage": usage_body(usage)})

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        """The answer in one piece."""
        body = {
            **self._head,
            "choices": [self._choice(index, choice) for index, choice in enumerate(choices)],
            "usage": usage_body(usage),
        }
        return orjson.dumps(body)

    @abstractmethod
    def _opening(self, index: int) -> Json | None:
        """What comes before the first text of a choice."""

    @abstractmethod
    def _chunk(self, index: int, delta: TextDelta) -> Json: ...

    @abstractmethod
    def _choice(self, index: int, choice: Choice) -> Json: ...


class ChatWriter(ResponseWriter):
    """`chat.completion` and `chat.completion.chunk`."""

    def _opening(self, index: int) -> Json:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _chunk(self, index: int, delta: TextDelta) -> Json:
        return {
            "index": index,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": self._logprobs(delta.entries),
            "finish_reason": delta.finish_reason,
        }

    def _choice(self, index: int, choice: Choice) -> Json:
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice.entries),
            "finish_reason": choice.finish_reason,
        }

    def _logprobs(self, entries: Sequence[TokenEntry]) -> Json | None:
        if not entries:
            return None
        content = []
        for entry in entries:
            top = [self._token(token_id, logprob) for token_id, logprob in entry.logprobs.top]
            content.append({**self._token(entry.token_id, entry.logprobs.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> Json:
        return {
            "token": self._tokenizer.token_text(token_id),
            "logprob": max(logprob, _LOWEST_LOGPROB),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }


class CompletionWriter(ResponseWriter):
    """`text_completion`, which has the same shape whole and in a stream."""

    def __init__(
        self, head: Json, tokenizer: Tokenizer, *, includes_usage: bool, echoes: Sequence[str] = ()
    ) -> None:
        """`echoes`: the text to put before each choice; empty for none at all."""
        super().__init__(head, tokenizer, includes_usage=includes_usage)
        self._echoes = echoes

    def _opening(self, index: int) -> Json | None:
        if not self._echoes:
            return None
        return {"index": index, "text": self._echoes[index], "logprobs": None, "finish_reason": None}

    def _chunk(self, index: int, delta: TextDelta) -> Json:
        return {
            "index": index,
            "text": delta.text,
            "logprobs": self._logprobs(delta.entries),
            "finish_reason": delta.finish_reason,
        }

    def _choice(self, index: int, choice: Choice) -> Json:
        echo = self._echoes[index] if self._echoes else ""
        return {
            "index": index,
            "text": echo + choice.text,
            "logprobs": self._logprobs(choice.entries),
            "finish_reason": choice.finish_reason,
        }

    def _logprobs(self, entries: Sequence[TokenEntry]) -> Json | None:
        if not entries:
            return None
        return {
            "tokens": [self._tokenizer.token_text(entry.token_id) for entry in entries],
            "token_logprobs": [max(entry.logprobs.logprob, _LOWEST_LOGPROB) for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries],
            "text_offset": [entry.offset for entry in entries],
        }

    def _top(self, entry: TokenEntry) -> dict[str, float]:
        """The most likely tokens and the chosen one; of tokens with equal text, the most likely."""
        top: dict[str, float] = {}
        for token_id, logprob in (*entry.logprobs.top, (entry.token_id, entry.logprobs.logprob)):
            top.setdefault(self._tokenizer.token_text(token_id), max(logprob, _LOWEST_LOGPROB))
        return top


def _event(body: Json) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"
