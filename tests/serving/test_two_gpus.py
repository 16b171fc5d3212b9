"""A group of two GPUs, each an actor that sees its own alone: served, a rank killed, and served again."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from cluster import launch
from cluster.client import Client
from tests.bench.models import LLAMA_8B
from tests.serving.conftest import llm, serve_file
from tests.serving.processes import descendants, eventually, processes

pytestmark = [pytest.mark.ray, pytest.mark.gpu]

MODEL = "two-gpus"
PATIENCE_S = 180.0
WORDS = [{"role": "user", "content": "word1 word2 word3"}]


@pytest.fixture(scope="module")
def url(
    ray_cluster: None, port: int, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The shape of Llama-3.1-8B but for its vocabulary."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    source = tmp_path_factory.mktemp("model")
    (source / "config.json").write_text(json.dumps(LLAMA_8B | {"vocab_size": 200, "eos_token_id": 0}))
    kwargs = {"device": "cuda", "load_format": "dummy", "tensor_parallel_size": 2, "max_model_len": 8192}
    memory = {"pool_bytes": "16GiB", "balloon_bytes": "2GiB"}
    placement = {"bundle_per_worker": {"CPU": 0.1, "GPU": 1}}
    one = llm(
        MODEL,
        source,
        tokenizer_dir,
        engine_kwargs=kwargs,
        memory=memory,
        placement_group_config=placement,
    )
    with launch.deployed(serve_file(port, "gpus", "/gpus", one), print) as found:
        yield f"{found}/gpus"


def ask(url: str, max_tokens: int = 32) -> str:
    body = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}
    return Client(url).chat(MODEL, WORDS, lambda piece: None, **body).text


@pytest.mark.timeout(600)
def test_served_lost_and_served_again(url: str, record_property: Callable[[str, object], None]) -> None:
    before = ask(url)
    assert len(before.split()) == 32
    with ThreadPoolExecutor(32) as clients:
        assert {len(answer.split()) for answer in clients.map(lambda _: ask(url), range(32))} == {32}
    (following,) = processes("ray::RankActor")
    group = {following, *processes("ray::EngineActor"), *processes("ray::ServeReplica:gpus:TpGroup")}
    body = {"model": MODEL, "messages": WORDS, "max_tokens": 7000, "stream": True, "ignore_eos": True}
    lines: list[str] = []
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=PATIENCE_S) as stream:
        for line in stream.iter_lines():
            lines.append(line)
            if len(lines) == 20:
                os.kill(following, signal.SIGKILL)
                killed = time.monotonic()
    assert any('"error"' in line for line in lines), lines[-5:]
    told_s = time.monotonic() - killed
    gone_s = eventually(lambda: not group & descendants(os.getpid()), PATIENCE_S)
    eventually(lambda: ask(url) == before, PATIENCE_S)
    for name, seconds in (("told", told_s), ("gone", gone_s), ("back", time.monotonic() - killed)):
        record_property(f"{name}_s", round(seconds, 2))
