"""The two doors of the serving front: to the engines (`ServedModel`) and to the metrics (`RequestObserver`).

The front knows neither Ray nor Prometheus; whoever wires the application passes objects of these shapes.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from cluster.tokenizer import Tokenizer
from engine.errors import BallonetError
from engine.messages import EngineInfo, EngineSnapshot, GenerateRequest, TokenDelta


class ServedModel(Protocol):
    """One model as the front sees it, whatever number of engines is behind it."""

    @property
    def model_id(self) -> str:
        """The name clients use."""

    @property
    def created(self) -> int:
        """When it began to be served, in seconds of Unix time."""

    async def info(self) -> EngineInfo:
        """Facts of its engines; asked for every request, so keep them after the first answer.

        Raises:
            EngineDeadError: no engine is there to ask.
        """

    async def tokenizer(self) -> Tokenizer:
        """Its tokenizer. The first call loads it, off the event loop: that takes seconds."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        """The request's tokens as they come; the last delta has a finish reason.

        Closing the generator, or cancelling whoever waits for it, cancels the request in the engine.

        Raises:
            RequestError, OverloadedError, EngineDeadError: from the first step, or wrapped by Ray.
        """

    async def is_healthy(self) -> bool:
        """Whether at least one engine can serve."""

    async def snapshot(self) -> list[EngineSnapshot]:
        """The newest snapshot of each engine."""

    async def trim(self, drop_cache: bool) -> list[int | BallonetError]:
        """Have each engine give the memory it does not use back to its device, with `drop_cache` that of
        cached prefixes too; the bytes that each gave, or why it did not.
        """


class RequestObserver(Protocol):
    """Hears of every request's events. Called on the event loop: must neither block nor raise.

    A request is one HTTP request, whatever its number of choices.
    """

    def request_started(self, model_id: str) -> None:
        """A valid request goes to the engine."""

    def first_token(self, model_id: str, seconds: float) -> None:
        """The first token came, `seconds` after the request arrived."""

    def inter_token(self, model_id: str, seconds: float, num_tokens: int) -> None:
        """`num_tokens` more tokens of one choice came, `seconds` after those before."""

    def request_finished(
        self, model_id: str, finish_reason: str, seconds: float, prompt_tokens: int, output_tokens: int
    ) -> None:
        """A started request ended: `stop`, `length`, `error` or `cancelled` (the client left)."""

    def request_rejected(self, model_id: str, status: int) -> None:
        """A request was answered with an HTTP error; `model_id` is "" when it named no known model.

        One that had started, such as an overload the engine found, is reported as finished too.
        """


class NullObserver:
    """The observer of those who need none."""

    def request_started(self, model_id: str) -> None:
        """Ignored."""

    def first_token(self, model_id: str, seconds: float) -> None:
        """Ignored."""

    def inter_token(self, model_id: str, seconds: float, num_tokens: int) -> None:
        """Ignored."""

    def request_finished(
        self, model_id: str, finish_reason: str, seconds: float, prompt_tokens: int, output_tokens: int
    ) -> None:
        """Ignored."""

    def request_rejected(self, model_id: str, status: int) -> None:
        """Ignored."""
