"""The front with the demo model's real tokenizer, whose tokens split characters and join words."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from cluster.ingress import create_app
from cluster.tokenizer import Tokenizer
from engine.messages import EngineInfo, GenerateRequest, TokenDelta
from tests.unit.ingress_fakes import FakeModel, Item

pytestmark = pytest.mark.model
TEXT = "Sure! 日本語 🙂👩‍👩‍👧 costs 12€.\nUser: next"
END_OF_TURN = 2


class DemoModel(FakeModel):
    """Answers everything with TEXT, `size` tokens a delta, and records the prompts as text."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        super().__init__(script=self._play)
        self._tokenizer = tokenizer
        self._size = size
        self.prompts: list[str] = []

    async def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    async def info(self) -> EngineInfo:
        return EngineInfo(
            "demo", "cpu", "float32", 2048, self._tokenizer.vocab_size, (END_OF_TURN,), 1, 1, 16, 1, 0.1
        )

    def _play(self, request: GenerateRequest) -> Iterable[Item]:
        self.prompts.append(self._tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False))
        tokens = [*self._tokenizer.encode(TEXT), END_OF_TURN]
        for start in range(0, len(tokens), self._size):
            piece = tuple(tokens[start : start + self._size])
            yield TokenDelta(
                request.request_id, piece, finish_reason="stop" if piece[-1] == END_OF_TURN else None
            )


@pytest.fixture(scope="module")
def tokenizer(demo_model_path: Path) -> Tokenizer:
    return Tokenizer.load(str(demo_model_path))


@pytest.mark.parametrize("size", [1, 4, 100])
@pytest.mark.parametrize("stop", [None, "\nUser:", "🙂", "👧"])
def test_chat_with_real_tokens(tokenizer: Tokenizer, size: int, stop: str | None) -> None:
    model = DemoModel(tokenizer, size)
    body: dict[str, Any] = {
        "model": "demo",
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "héllo"}],
        "stop": stop,
        "max_tokens": 100,
    }
    with TestClient(create_app({"demo": model})) as client:
        whole = client.post("/v1/chat/completions", json=body).json()
        stream = client.post("/v1/chat/completions", json={**body, "stream": True}).text
    chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    streamed = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert whole["choices"][0]["message"]["content"] == streamed == TEXT.split(stop or "never")[0]
    assert whole["choices"][0]["finish_reason"] == chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert model.prompts[0] == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhéllo<|im_end|>\n<|im_start|>assistant\n"
    )
