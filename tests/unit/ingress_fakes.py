"""A served model that plays a script, and a tokenizer whose tokens are single bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from cluster.tokenizer import Tokenizer
from cluster.tokenizer_files import TokenizerFiles
from engine.errors import BallonetError
from engine.messages import (
    EngineInfo,
    EngineSnapshot,
    FinishReason,
    GenerateRequest,
    MemorySnapshot,
    TokenDelta,
    TokenLogprobs,
)

START, END, VOCAB_SIZE = 256, 257, 258
MAX_MODEL_LEN = 200
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and loop.first %}"
    "{{ raise_exception('the user speaks first') }}{% endif %}"
    "<|start|>{{ m['role'] }}:{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant:{% endif %}{{ suffix | default('') }}"
)

Item = TokenDelta | Exception | asyncio.Event
Script = Callable[[GenerateRequest], Iterable[Item]]


def byte_tokenizer(template: str | None = TEMPLATE) -> Tokenizer:
    """Token i is byte i; 256 and 257 are special."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    chars = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    backend = Backend(models.BPE(vocab={**chars, "<|start|>": START, "<|end|>": END}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|start|>"), AddedToken("<|end|>")])
    return Tokenizer(TokenizerFiles(backend, template, {"eos_token": "<|end|>"}))


def text_script(
    text: str | bytes,
    *,
    size: int = 1,
    finish: FinishReason = "stop",
    error: str | None = None,
    cached: int = 0,
) -> Script:
    """Plays `text`, `size` bytes a delta; `stop` adds the end token; `cached` tokens of the prompt."""
    data = text.encode() if isinstance(text, str) else text
    tokens = [*data, END] if finish == "stop" else list(data)

    def play(request: GenerateRequest) -> Iterable[Item]:
        for start in range(0, max(len(tokens), 1), size):
            piece = tuple(tokens[start : start + size])
            last = start + size >= len(tokens)
            yield TokenDelta(
                request.request_id,
                piece,
                fake_logprobs(piece, request.sampling.logprobs),
                finish if last else None,
                error if last else None,
                num_cached_tokens=cached,
            )

    return play


def fake_logprobs(token_ids: Sequence[int], num: int | None) -> tuple[TokenLogprobs, ...]:
    """The chosen token at -0.5, then 'X' and 'Y'."""
    if num is None:
        return ()
    return tuple(
        TokenLogprobs(-0.5, ((token, -0.5), (ord("X"), -2.0), (ord("Y"), float("-inf")))[:num])
        for token in token_ids
    )


@dataclass
class FakeModel:
    """Plays `script` for every request and remembers what happened to each."""

    script: Script = field(default_factory=lambda: text_script("Hello world"))
    model_id: str = "org/tiny"
    created: int = 1_700_000_000
    template: str | None = TEMPLATE
    is_up: bool = True
    info_error: Exception | None = None
    requests: list[GenerateRequest] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    num_yielded: int = 0
    released: list[int | BallonetError] = field(default_factory=lambda: [4096])
    trims: list[bool] = field(default_factory=list)

    async def info(self) -> EngineInfo:
        if self.info_error is not None:
            raise self.info_error
        return EngineInfo(
            self.model_id, "cpu", "float32", MAX_MODEL_LEN, VOCAB_SIZE, (END,), 1 << 20, 1 << 20, 16, 1, 0.1
        )

    async def tokenizer(self) -> Tokenizer:
        return byte_tokenizer(self.template)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        self.requests.append(request)
        try:
            for item in self.script(request):
                await asyncio.sleep(0)
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, asyncio.Event):
                    await item.wait()
                    continue
                self.num_yielded += 1
                yield item
        finally:
            self.closed.append(request.request_id)

    async def is_healthy(self) -> bool:
        return self.is_up

    async def snapshot(self) -> list[EngineSnapshot]:
        if self.info_error is not None:
            raise self.info_error
        memory = MemorySnapshot(4096, 10, 3, 3, 1, 2, 0, 1, 0, 10, 5, 7, weight_bytes=9)
        return [EngineSnapshot(self.model_id, 1.0, 0, 1, 2, 0, 3, 4, (("stop", 1),), 0.1, memory, 8, 6)]

    async def trim(self, drop_cache: bool) -> list[int | BallonetError]:
        self.trims.append(drop_cache)
        return self.released


class RecordingObserver:
    """Keeps every event, times left out."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def request_started(self, model_id: str) -> None:
        self.events.append(("started", model_id))

    def first_token(self, model_id: str, seconds: float) -> None:
        assert seconds >= 0
        self.events.append(("first", model_id))

    def inter_token(self, model_id: str, seconds: float, num_tokens: int) -> None:
        assert seconds >= 0
        self.events.append(("inter", model_id, num_tokens))

    def request_finished(
        self, model_id: str, finish_reason: str, seconds: float, prompt_tokens: int, output_tokens: int
    ) -> None:
        assert seconds >= 0
        self.events.append(("finished", model_id, finish_reason, prompt_tokens, output_tokens))

    def request_rejected(self, model_id: str, status: int) -> None:
        self.events.append(("rejected", model_id, status))
