"""The file `make demo` uses, with its real model, through everything."""

from __future__ import annotations

import dataclasses
import json
import time

import httpx
import openai
import pytest

from cluster.client import Answer, Client
from engine.messages import EngineSnapshot
from tests.serving.conftest import ADMIN_KEY

pytestmark = [pytest.mark.ray, pytest.mark.model]

MODEL = "smollm2-135m-instruct"


def _idle(client: Client) -> EngineSnapshot:
    """The engine's state once no sequence lives."""
    deadline = time.monotonic() + 20
    while True:
        (now,) = client.status()[MODEL]
        if now.num_running == 0 and now.memory.kv == 0:
            return now
        assert time.monotonic() < deadline, dataclasses.asdict(now)
        time.sleep(0.1)


def test_it_answers(demo_url: str) -> None:
    pieces: list[str] = []
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = Client(demo_url).chat(MODEL, question, pieces.append, temperature=0, max_tokens=40)
    assert "Paris" in answer.text
    assert len(pieces) > 3
    assert answer.finish_reason == "stop"


def test_greedy_answers_repeat_with_and_without_a_stream(demo_url: str) -> None:
    client = openai.OpenAI(base_url=f"{demo_url}/v1", api_key="none", max_retries=0)
    asked = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Count from one to five."}],
        "max_tokens": 16,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**asked).choices[0].message.content
    parts = client.chat.completions.create(**asked, stream=True)
    assert whole
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == whole


def test_the_second_turn_is_cached_and_trimming_gives_memory_back(demo_url: str) -> None:
    admin = Client(demo_url, ADMIN_KEY)
    story = "A ship sailed north for nineteen days and found an island of birds. " * 12
    messages = [{"role": "user", "content": f"{story}What did it find?"}]

    def ask() -> Answer:
        return admin.chat(MODEL, messages, lambda _: None, temperature=0, max_tokens=8)

    first = ask()
    messages.append({"role": "assistant", "content": first.text})
    messages.append({"role": "user", "content": "How long did it sail?"})
    second = ask()
    # The template begins every chat alike, so the first turn may find that much of the tests before it.
    assert first.cached_tokens < 50 < 150 < second.cached_tokens
    before = _idle(admin)
    (released,) = admin.trim(drop_cache=True)[MODEL]
    (after,) = admin.status()[MODEL]
    assert isinstance(released, int)
    assert released >= before.memory.cached * before.memory.chunk_bytes > 0
    assert released == (before.memory.created - after.memory.created) * after.memory.chunk_bytes
    again = ask()
    assert (again.cached_tokens, again.text) == (0, second.text)


def test_a_client_that_leaves_frees_its_memory(demo_url: str) -> None:
    body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 1500, "stream": True}
    body |= {"temperature": 0, "ignore_eos": True}
    with httpx.stream("POST", f"{demo_url}/v1/completions", json=body, timeout=60) as response:
        for _, line in zip(range(8), response.iter_lines(), strict=False):
            assert not line or "error" not in json.loads(line.removeprefix("data: "))
        (busy,) = Client(demo_url).status()[MODEL]
        assert busy.num_running == 1
        assert busy.memory.kv > 0
    assert dict(_idle(Client(demo_url)).finished)["cancelled"] >= 1
