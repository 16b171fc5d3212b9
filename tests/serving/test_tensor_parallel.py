"""The demo model on two ranks, each an actor of its own: served, lost, and served again."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import ray
from ray.util import list_named_actors

from cluster import launch
from cluster.client import Client
from tests.serving.conftest import serve_file
from tests.serving.processes import descendants, eventually, processes

pytestmark = [pytest.mark.ray, pytest.mark.model]

MODEL = "two-ranks"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def url(ray_cluster: None, base_url: str, port: int, demo_model_path: Path) -> Iterator[str]:
    llm = {
        "model_loading_config": {"model_id": MODEL, "model_source": str(demo_model_path)},
        "engine_kwargs": {"tensor_parallel_size": 2, "device": "cpu", "max_model_len": 1024},
        "memory": {"pool_bytes": "64MiB"},
        "placement_group_config": {"bundle_per_worker": {"CPU": 0.1}},
        "deployment_config": {"health_check_period_s": 0.5, "graceful_shutdown_timeout_s": 1.0},
    }
    file = serve_file(port, "ranks", "/ranks", llm)
    with launch.deployed(file, print) as found:
        yield f"{found}/ranks"


def ask(url: str) -> str:
    return Client(url).chat(MODEL, QUESTION, lambda piece: None, temperature=0, max_tokens=24).text


def group_processes() -> dict[str, int]:
    """Process ids of the group's replica and ranks, by their class."""
    named = [one for one in list_named_actors(all_namespaces=True) if MODEL in one["name"]]
    engine = ray.get_actor(**next(one for one in named if one["name"].endswith(":rank0")))
    (following,) = processes("ray::RankActor")
    (replica,) = processes("ray::ServeReplica:ranks:TpGroup")
    return {
        "ServeReplica": replica,
        "EngineActor": ray.get(engine.__ray_call__.remote(lambda self: os.getpid())),
        "RankActor": following,
    }


def test_two_ranks_answer_as_one_does(url: str, demo_url: str) -> None:
    one = Client(demo_url).chat(
        "smollm2-135m-instruct", QUESTION, lambda piece: None, temperature=0, max_tokens=24
    )
    assert ask(url) == one.text
    assert "Paris" in one.text


@pytest.mark.parametrize("kind", ["RankActor", "EngineActor", "ServeReplica"])
def test_a_killed_process_takes_the_group_down_and_it_comes_back(
    url: str, kind: str, record_property: Callable[[str, object], None]
) -> None:
    """Its streams end with an error, nothing hangs, and the same question has the same answer later."""
    before, all_processes = ask(url), group_processes()
    body = {
        "model": MODEL,
        "messages": QUESTION,
        "max_tokens": 900,
        "stream": True,
        "ignore_eos": True,
        "temperature": 0,
    }
    lines: list[str] = []
    with (
        contextlib.suppress(httpx.HTTPError),  # a broken stream is an end too; a silent one is not
        httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=PATIENCE_S) as stream,
    ):
        for line in stream.iter_lines():
            lines.append(line)
            if len(lines) == 10:
                os.kill(all_processes[kind], signal.SIGKILL)
    assert any('"error"' in line for line in lines), lines[-5:]
    # Ranks wait for one another in sums; all must end, or they would hold the memory that the next ones need.
    gone_s = eventually(lambda: not set(all_processes.values()) & descendants(os.getpid()), PATIENCE_S)
    record_property(f"gone_s_{kind}", gone_s)
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with contextlib.suppress(Exception):
            assert ask(url) == before
            break
        assert time.monotonic() < deadline, "the group has not come back"
        time.sleep(0.5)
