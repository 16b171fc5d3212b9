"""The front with the demo model's real tokenizer, whose tokens split characters and join words, and with
the model itself: what a client sees of prefix cache and trimming."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from cluster.ingress import IngressConfig, create_app
from cluster.token_inbox import TokenInbox
from cluster.tokenizer import Tokenizer
from engine.actor import EngineActor
from engine.config import MIB, EngineConfig, MemoryConfig, ModelSource, SchedulerConfig
from engine.errors import BallonetError, EngineDeadError
from engine.messages import EngineInfo, EngineSnapshot, GenerateRequest, TokenDelta
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


class LocalModel(DemoModel):
    """The demo model itself: an engine actor in this process, without Ray."""

    def __init__(self, tokenizer: Tokenizer, actor: EngineActor) -> None:
        super().__init__(tokenizer, 1)
        self._actor = actor
        self._inbox = TokenInbox("127.0.0.1")

    async def info(self) -> EngineInfo:
        return await self._actor.info()

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenDelta]:  # type: ignore[override]
        stream = self._inbox.open(request.request_id)
        call = asyncio.create_task(self._actor.generate(request, stream.reply_to))
        try:
            while not (delta := await stream.get()).finish_reason:
                yield delta
            yield delta
            await call
        finally:
            stream.close()
            call.cancel()

    async def snapshot(self) -> list[EngineSnapshot]:
        return [await self._actor.snapshot()]

    async def trim(self, drop_cache: bool) -> list[int | BallonetError]:
        return [await self._actor.trim(drop_cache)]


@contextmanager
def _serving(path: Path, tokenizer: Tokenizer, *, caches: bool) -> Iterator[TestClient]:
    memory = MemoryConfig(pool_bytes=192 * MIB, enable_prefix_caching=caches, trim_after_s=None)
    limits = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=256)
    config = EngineConfig(ModelSource("demo", str(path)), memory, limits, max_model_len=1024)
    actor = EngineActor(config)
    app = create_app({"demo": LocalModel(tokenizer, actor)}, IngressConfig(admin_api_keys=("root",)))
    try:
        with TestClient(app, headers={"authorization": "Bearer root"}) as client:
            yield client
    finally:
        asyncio.run(actor.shutdown())


@pytest.fixture(scope="module")
def caching(demo_model_path: Path, tokenizer: Tokenizer) -> Iterator[TestClient]:
    with _serving(demo_model_path, tokenizer, caches=True) as client:
        yield client


@pytest.fixture(scope="module")
def bare(demo_model_path: Path, tokenizer: Tokenizer) -> Iterator[TestClient]:
    """The same without a prefix cache."""
    with _serving(demo_model_path, tokenizer, caches=False) as client:
        yield client


STORY = "The captain sailed north for nineteen days and found an island of birds. " * 10
TURN = {"role": "user", "content": f"{STORY}What did the captain find?"}


def _ask(
    client: TestClient, salt: str | None, messages: list[dict[str, str]], **fields: Any
) -> tuple[str, int, int]:
    """The greedy answer, tokens of the prompt, and those of them that were cached. A salt nobody has used
    finds nothing, whatever other tests have asked."""
    body = {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 12, **fields}
    body["cache_salt"] = salt
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    usage = answer["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return answer["choices"][0]["message"]["content"], usage["prompt_tokens"], cached


def _memory(client: TestClient) -> dict[str, Any]:
    """The engine's, once the sequence whose last token was just answered has left."""
    deadline = time.monotonic() + 10
    while True:
        (model,) = client.get("/status").json()["models"]
        (engine,) = model["engines"]
        if engine["num_running"] == 0:
            return dict(engine["memory"])
        assert time.monotonic() < deadline, engine


def _trim(client: TestClient, **body: Any) -> int:
    response = client.post("/trim", json=body)
    assert response.status_code == 200, response.text
    return int(response.json()["models"][0]["engines"][0]["released_bytes"])


def test_the_second_turn_goes_on_from_the_first(caching: TestClient, bare: TestClient) -> None:
    text, first_tokens, cached = _ask(caching, "turns", [TURN])
    assert cached == 0
    said = {"role": "assistant", "content": text}
    messages = [TURN, said, {"role": "user", "content": "For how many days?"}]
    answer, num_tokens, cached = _ask(caching, "turns", messages)
    assert first_tokens // 2 < cached < num_tokens
    assert _ask(bare, "turns", messages) == (answer, num_tokens, 0)


def test_another_salt_shares_nothing(caching: TestClient) -> None:
    answer = _ask(caching, "one", [TURN])
    assert answer[2] == 0
    assert _ask(caching, "two", [TURN]) == answer
    again = _ask(caching, "one", [TURN])
    assert again[:2] == answer[:2]
    assert again[2] > 0


def test_those_without_a_salt_share_with_one_another_only(caching: TestClient) -> None:
    turn = {"role": "user", "content": f"{STORY}Who was the captain?"}
    _ask(caching, "mine", [turn])
    _, num_tokens, cached = _ask(caching, None, [turn])
    assert cached < num_tokens // 2
    assert _ask(caching, None, [turn])[2] > num_tokens // 2


def test_choices_of_a_prompt_that_was_cached_count_it_once(caching: TestClient) -> None:
    _ask(caching, "choices", [TURN])
    _, num_tokens, cached = _ask(caching, "choices", [TURN], n=3)
    assert 0 < cached < num_tokens


def test_trimming_gives_back_what_is_free_and_the_cache_on_demand(caching: TestClient) -> None:
    answer = _ask(caching, "trim", [TURN])
    before = _memory(caching)
    assert _trim(caching) > 0
    kept = _memory(caching)
    assert kept["created"] < before["created"]
    assert kept["cached"] == before["cached"] > 0
    assert _ask(caching, "trim", [TURN])[2] > 0
    assert _trim(caching, drop_cache=True) >= before["cached"] * before["chunk_bytes"]
    assert _memory(caching)["cached"] == 0
    assert _ask(caching, "trim", [TURN]) == answer  # memory is taken again, and nothing was cached


def test_an_engine_without_a_cache_trims_too(bare: TestClient) -> None:
    answer = _ask(bare, None, [TURN])
    before = _memory(bare)
    released = _trim(bare)
    after = _memory(bare)
    assert released == (before["created"] - after["created"]) * after["chunk_bytes"] > 0
    assert after["cached"] == before["cached"] == 0
    assert _ask(bare, None, [TURN]) == answer


def test_a_trim_that_meets_a_shutdown_is_done_or_told_why_not(demo_model_path: Path) -> None:
    config = EngineConfig(
        ModelSource("demo", str(demo_model_path)), MemoryConfig(pool_bytes=64 * MIB), max_model_len=512
    )
    actor = EngineActor(config)

    async def meet() -> list[object]:
        await actor.info()
        await asyncio.sleep(0.1)  # idle by now
        return list(await asyncio.gather(actor.shutdown(), actor.trim(), return_exceptions=True))

    _, told = asyncio.run(meet())
    assert isinstance(told, int | EngineDeadError)
    with pytest.raises(EngineDeadError, match="was shut down"):
        asyncio.run(actor.trim())


def test_a_step_loop_that_stands_still_is_noticed(demo_model_path: Path) -> None:
    config = EngineConfig(
        ModelSource("demo", str(demo_model_path)),
        MemoryConfig(pool_bytes=64 * MIB),
        max_model_len=512,
        step_timeout_s=60.0,
    )
    ahead_s = 0.0  # of a step loop that does not come round
    actor = EngineActor(config, clock=lambda: time.monotonic() + ahead_s)

    async def check(seconds: float) -> None:
        nonlocal ahead_s
        ahead_s = seconds
        await actor.check_health()

    async def case() -> None:
        await check(1000.0)  # it loads, which may take long
        await actor.info()
        await asyncio.sleep(1.0)  # idle: the loop comes round all the same
        await check(0.0)
        await check(30.0)
        with pytest.raises(EngineDeadError, match="no step has ended for"):
            await check(1000.0)
        await check(0.0)
        await actor.shutdown()
        with pytest.raises(EngineDeadError, match="was shut down"):
            await check(0.0)

    asyncio.run(case())
