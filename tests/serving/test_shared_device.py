"""Two models that share the CPU of a node: the controller's actor moves their pools' limits with the load."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from cluster import launch
from cluster.client import Client
from engine.messages import EngineSnapshot
from tests.bench.swinging_load import TINY_LLAMA
from tests.serving.conftest import llm, serve_file
from tests.serving.processes import eventually

pytestmark = pytest.mark.ray

OWN, NUM_CLIENTS, PATIENCE_S = 16 << 20, 16, 90.0
MODELS = "left", "right"


@pytest.fixture(scope="module")
def url(
    ray_cluster: None,
    base_url: str,
    port: int,
    tokenizer_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """Each has 16 MiB for 2,000 tokens at its start: six of the requests below."""
    source = tmp_path_factory.mktemp("tiny")
    (source / "config.json").write_text(json.dumps(TINY_LLAMA | {"vocab_size": 200}))
    shared = {
        "engine_kwargs": {
            "device": "cpu",
            "load_format": "dummy",
            "max_model_len": 512,
            "max_num_seqs": 32,
            "max_num_batched_tokens": 128,
            "num_threads": 1,
        },
        "memory": {"device_share": 0.5, "pool_bytes": OWN, "chunk_bytes": 65536},
        "placement_group_config": {"bundle_per_worker": {"CPU": 0.1}},
    }
    file = serve_file(
        port, "shared", "/shared", *[llm(one, source, tokenizer_dir, **shared) for one in MODELS]
    )
    with launch.deployed(file, print) as found:
        yield f"{found}/shared"


class Load:
    """Clients that ask one model for answers, one after another, until the block ends."""

    def __init__(self, url: str, model: str) -> None:
        self._url, self._model = url, model
        self._stop = threading.Event()
        self._clients = ThreadPoolExecutor(NUM_CLIENTS)
        self.num_answers = 0

    def __enter__(self) -> Load:
        self._running = [self._clients.submit(self._ask, number) for number in range(NUM_CLIENTS)]
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self.num_answers = sum(client.result(PATIENCE_S) for client in self._running)
        self._clients.shutdown()

    def _ask(self, number: int) -> int:
        count, prompt = 0, [number + 1] * 100
        body = {"model": self._model, "prompt": prompt, "max_tokens": 200, "ignore_eos": True}
        while not self._stop.is_set():
            response = httpx.post(f"{self._url}/v1/completions", json=body, timeout=PATIENCE_S)
            assert response.status_code == 200, response.text
            assert response.json()["usage"]["completion_tokens"] == 200
            count += 1
        return count


def _limits(url: str) -> dict[str, int]:
    status: dict[str, list[EngineSnapshot]] = Client(url).status()  # type: ignore[assignment]
    limits = {}
    for model in MODELS:
        (now,) = status[model]
        assert now.shared_device == "cpu"
        assert now.memory.configured * now.memory.chunk_bytes == OWN
        limits[model] = now.memory.limit * now.memory.chunk_bytes
    assert sum(limits.values()) <= 2 * OWN, "promised twice"
    return limits


def test_memory_follows_the_load_from_one_model_to_the_other(url: str) -> None:
    for busy in MODELS:
        with Load(url, busy) as load:
            eventually(lambda busy=busy: _limits(url)[busy] > 1.3 * OWN, PATIENCE_S)  # type: ignore[misc]
        assert load.num_answers >= NUM_CLIENTS
    (now,) = Client(url).status()["right"]
    assert now.order is not None
    assert now.order.pool_bytes == now.memory.limit * now.memory.chunk_bytes
    assert dict(now.finished).get("error", 0) == 0
