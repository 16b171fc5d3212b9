"""Runs the choices of one request side by side and lets none outlive it.

Whoever closes `Generation.deltas()`, or is cancelled while waiting for it, has closed the engine request of
every choice by the time the close returns.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from cluster.streaming import RequestObserver, ServedModel
from cluster.text_stream import TextDelta, TextOptions, TextStream, TokenEntry
from cluster.tokenizer import Tokenizer
from engine.errors import BallonetError, EngineDeadError
from engine.messages import GenerateRequest, TokenDelta

# Deltas of several choices that may wait for a slow client before the pumps stop reading.
_MERGE_QUEUE_DELTAS = 64


@dataclass(slots=True)
class Choice:
    """A finished choice, collected."""

    text: str = ""
    entries: list[TokenEntry] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request has cost so far, over all its choices.

    Attributes:
        prompt_tokens: counted once a prompt, not once a choice.
        cached_tokens: those of them that nothing was computed for. Of the choices of a prompt the one that
            found the least counts: what it did not find was computed for this request, though its
            siblings may then have found it.
    """

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int


@dataclass(slots=True)
class Generation:
    """One request with all its choices.

    Attributes:
        requests: one a choice, in the order of the answer: `num_choices` of each prompt.
        arrived_s: `time.perf_counter()` when the HTTP request came in.
    """

    model: ServedModel
    tokenizer: Tokenizer
    requests: Sequence[GenerateRequest]
    num_choices: int
    options: TextOptions
    observer: RequestObserver
    arrived_s: float
    _num_output_tokens: int = 0
    _num_cached_tokens: dict[int, int] = field(default_factory=dict)
    _newest_s: dict[int, float] = field(default_factory=dict)

    @property
    def usage(self) -> Usage:
        """What it has cost so far."""
        firsts = range(0, len(self.requests), self.num_choices)
        cached = self._num_cached_tokens
        return Usage(
            sum(len(self.requests[first].prompt_token_ids) for first in firsts),
            self._num_output_tokens,
            sum(min(cached.get(first + choice, 0) for choice in range(self.num_choices)) for first in firsts),
        )

    async def deltas(self) -> AsyncGenerator[tuple[int, TextDelta], None]:
        """(choice, what it gained) as it comes, until every choice has ended.

        Raises:
            BallonetError: a choice failed; the others are cancelled.
        """
        self.observer.request_started(self.model.model_id)
        reason = "cancelled"
        newest: str = "stop"
        try:
            choices = [self._choice(index) for index in range(len(self.requests))]
            async with aclosing(_merge(choices)) as merged:
                async for index, delta in merged:
                    self._count(index, delta)
                    newest = delta.finish_reason or newest
                    if not delta.is_empty:
                        yield index, delta
            reason = newest
        except Exception:
            reason = "error"
            raise
        finally:
            usage = self.usage
            self.observer.request_finished(
                self.model.model_id,
                reason,
                time.perf_counter() - self.arrived_s,
                usage.prompt_tokens,
                usage.output_tokens,
            )

    async def collect(self) -> list[Choice]:
        """Every choice as a whole."""
        choices = [Choice() for _ in self.requests]
        async with aclosing(self.deltas()) as deltas:
            async for index, delta in deltas:
                choice = choices[index]
                choice.text += delta.text
                choice.entries.extend(delta.entries)
                choice.finish_reason = delta.finish_reason or choice.finish_reason
        return choices

    def _count(self, index: int, delta: TextDelta) -> None:
        if not delta.num_tokens:
            return
        now = time.perf_counter()
        if index in self._newest_s:
            self.observer.inter_token(self.model.model_id, now - self._newest_s[index], delta.num_tokens)
        elif not self._newest_s:
            self.observer.first_token(self.model.model_id, now - self.arrived_s)
        self._newest_s[index] = now
        self._num_output_tokens += delta.num_tokens

    async def _choice(self, index: int) -> AsyncGenerator[TextDelta, None]:
        request, text = self.requests[index], TextStream(self.tokenizer, self.options)
        async with aclosing(self.model.generate(request)) as tokens:
            async for delta in tokens:
                _raise_if_failed(delta)
                self._num_cached_tokens.setdefault(index, delta.num_cached_tokens)
                gained = text.push(delta)
                yield gained
                if gained.finish_reason is not None:
                    return
        raise EngineDeadError(f"the engine ended {request.request_id} without a finish reason")


def _raise_if_failed(delta: TokenDelta) -> None:
    if delta.finish_reason == "error":
        raise BallonetError(delta.error or "the engine could not finish this request")
    if delta.finish_reason == "cancelled":
        # Nobody here cancelled it: whoever did, such as an engine that shuts down, left it unfinished.
        raise EngineDeadError("the engine gave this request up before it was finished")


async def _merge(
    streams: Sequence[AsyncGenerator[TextDelta, None]],
) -> AsyncGenerator[tuple[int, TextDelta], None]:
    """The items of all streams as they come, with the stream's index; all are closed at the end."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for delta in only:
                yield 0, delta
        return
    queue: asyncio.Queue[tuple[int, TextDelta | Exception | None]] = asyncio.Queue(_MERGE_QUEUE_DELTAS)
    pumps = [asyncio.create_task(_pump(index, stream, queue)) for index, stream in enumerate(streams)]
    try:
        num_open = len(streams)
        while num_open:
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield index, item
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(
    index: int,
    stream: AsyncGenerator[TextDelta, None],
    queue: asyncio.Queue[tuple[int, TextDelta | Exception | None]],
) -> None:
    try:
        async with aclosing(stream):
            async for delta in stream:
                await queue.put((index, delta))
    except Exception as error:  # travels to the reader of the queue, who raises it
        await queue.put((index, error))
    else:
        await queue.put((index, None))
