"""A hundred and twenty requests of every kind through everything, a fifth of them abandoned half-way."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter

import httpx
import pytest

from cluster.client import Client
from engine.messages import EngineSnapshot

pytestmark = [pytest.mark.ray, pytest.mark.model, pytest.mark.timeout(600)]

MODEL = "smollm2-135m-instruct"
NUM_REQUESTS = 120
WORDS = ("the", "sea", "a", "ship", "seven", "men", "sailed", "to", "find", "an", "island", "of", "birds")


def _body(rng: random.Random) -> tuple[str, dict[str, object]]:
    """A path and a body: chat or completion, short or long, streamed or whole, greedy or sampled."""
    text = " ".join(rng.choices(WORDS, k=rng.choice([3, 20, 150])))
    body: dict[str, object] = {
        "model": MODEL,
        "max_tokens": rng.randint(2, 24),
        "temperature": rng.choice([0, 0.8]),
        "stream": rng.random() < 0.6,
    }
    body |= rng.choice(
        [{}, {"n": 2}, {"stop": ["."]}, {"presence_penalty": 0.5}, {"seed": 7}, {"top_p": 0.9}]
    )
    if rng.random() < 0.5:
        return "/v1/completions", body | {"prompt": text}
    return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}


async def _one(client: httpx.AsyncClient, rng: random.Random, leaves_after_s: float | None) -> str:
    """How one request ended: `served`, or `left` if its client went away first."""
    path, body = _body(rng)
    request = client.post(path, json=body)
    try:
        response = await asyncio.wait_for(request, leaves_after_s)
    except TimeoutError:
        return "left"
    assert response.status_code == 200, response.text
    if body["stream"]:
        assert response.text.endswith("data: [DONE]\n\n")
        assert '"error"' not in response.text
    else:
        assert all(c["finish_reason"] in ("stop", "length") for c in response.json()["choices"])
    return "served"


async def _load(url: str) -> Counter[str]:
    rng = random.Random(11)
    gate = asyncio.Semaphore(32)
    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:

        async def gated(index: int) -> str:
            async with gate:
                leaves = rng.uniform(0.02, 1.5) if index % 5 == 0 else None
                return await _one(client, random.Random(index), leaves)

        return Counter(await asyncio.gather(*(gated(index) for index in range(NUM_REQUESTS))))


def _settled(client: Client) -> EngineSnapshot:
    """The engine's state once nothing runs."""
    deadline = time.monotonic() + 60
    while True:
        (now,) = client.status()[MODEL]
        if now.num_running == now.num_waiting == 0:
            return now
        assert time.monotonic() < deadline, now
        time.sleep(0.1)


def test_nothing_is_lost_and_nothing_stays(demo_url: str) -> None:
    client = Client(demo_url)
    before = dict(_settled(client).finished)
    outcomes = asyncio.run(_load(demo_url))
    assert outcomes["served"] + outcomes["left"] == NUM_REQUESTS
    assert outcomes["left"] >= NUM_REQUESTS // 10
    after = _settled(client)
    memory = after.memory
    owned = memory.kv + memory.cached + memory.activation + memory.guard
    assert memory.free + owned + memory.retiring == memory.total
    assert memory.kv == memory.kv_tokens == memory.retiring == 0
    finished = dict(after.finished)
    assert finished.get("error", 0) == before.get("error", 0)
    assert finished["cancelled"] > before.get("cancelled", 0)
