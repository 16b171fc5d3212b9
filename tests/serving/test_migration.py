"""Streams that move from one group to another while their clients read: real engines, and a tiny model."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray

from cluster import launch
from engine.migration import MigrationResult
from tests.serving.conftest import ROOT, llm, serve_file
from tests.serving.processes import eventually
from tests.unit.model_cases import save_tiny

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

MODEL, NUM_TOKENS, VOCAB = "mover", 700, 199
PATIENCE_S = 120.0
SAMPLINGS = ({"temperature": 0}, {"temperature": 0.9, "seed": 7, "presence_penalty": 0.5})


def movers(path: Path, tokenizer_dir: Path, **deployment: Any) -> dict[str, Any]:
    """Two groups of a tiny model at `path`, each with memory for one long answer or two."""
    save_tiny("llama", path)
    config = path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 1024}))
    return llm(
        MODEL,
        path,
        tokenizer_dir,
        engine_kwargs={
            "device": "cpu",
            "max_num_seqs": 8,
            "max_num_batched_tokens": 64,
            "max_model_len": 1024,
            "turn_tokens": 8,
            "min_retained_chunks": 0,
            "deposit": False,
        },
        memory={"pool_bytes": "640KiB", "chunk_bytes": "4KiB", "balloon_bytes": "16MiB"},
        slo={"ttft_ms": 1000, "tpot_ms": 1000},
        deployment_config={"num_replicas": 2},
        **deployment,
    )


@pytest.fixture(scope="module")
def url(
    ray_cluster: None, base_url: str, port: int, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    entry = movers(tmp_path_factory.mktemp("tiny"), tokenizer_dir)
    with launch.deployed(serve_file(port, "moving", "/moving", entry), print) as found:
        yield f"{found}/moving"


class Reader(threading.Thread):
    """A client that reads a stream to its end.

    Attributes:
        text: so far.
        finish_reason: None until there is one.
        errors: events that are none of a healthy stream's.
    """

    def __init__(self, url: str, number: int) -> None:
        super().__init__(daemon=True)
        self.number = number
        self.text = ""
        self.finish_reason: str | None = None
        self.errors: list[str] = []
        self.leaves = False
        self._url = url
        self.start()

    def run(self) -> None:
        headers = {"x-request-id": f"reader{self.number}", "x-slo-deposit": "off"}
        with httpx.stream(
            "POST", f"{self._url}/v1/completions", json=body(self.number), headers=headers, timeout=PATIENCE_S
        ) as response:
            for line in response.iter_lines():
                if self.leaves:
                    return
                if line.startswith("data: {"):
                    self._take(json.loads(line.removeprefix("data: ")))

    def _take(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self.errors.append(str(event["error"]))
        for choice in event.get("choices", ()):
            self.text += choice["text"]
            self.finish_reason = choice["finish_reason"] or self.finish_reason


def body(number: int) -> dict[str, Any]:
    prompt = random.Random(number).choices(range(VOCAB), k=30 + number)
    asked = {"model": MODEL, "prompt": prompt, "max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": True}
    return asked | SAMPLINGS[number % 2]


def engines() -> dict[str, Any]:
    """The engine actors, by their groups' ids."""
    named = [
        one for one in ray.util.list_named_actors(all_namespaces=True) if f"TpGroup-{MODEL}" in one["name"]
    ]
    return {
        one["name"].split(":")[2]: (one["name"], ray.get_actor(**one))
        for one in named
        if one["name"].endswith(":rank0")
    }


def move_any(readers: list[Reader]) -> tuple[Reader, str]:
    """Move a parked request, of whichever group has one; its reader and the group that it went to."""
    groups, moved = engines(), []
    assert len(groups) == 2

    def has_moved() -> bool:
        assert any(reader.is_alive() for reader in readers), "they ended before anybody could move"
        for source, target in (sorted(groups), sorted(groups)[::-1]):
            name, _ = groups[target]
            result: MigrationResult = ray.get(groups[source][1].migrate.remote(name, target), timeout=60)
            if result.outcome == "migrated":
                moved.append((result, target))
                return True
            assert result.outcome == "not_movable", result
        return False

    eventually(has_moved, PATIENCE_S)
    result, target = moved[0]
    assert result.num_bytes > 0
    number = int(result.request_id.removeprefix("reader").split("-")[0])
    return next(reader for reader in readers if reader.number == number), target


def test_a_stream_moves_and_its_client_notices_nothing(url: str) -> None:
    """Twice as much as both groups have memory for: they take turns, and one request goes over."""
    readers = [Reader(url, number) for number in range(8)]
    reader, _ = move_any(readers)
    at, started = len(reader.text), time.monotonic()
    assert reader.finish_reason is None, "it moved in the midst of its answer"
    for one in readers:
        one.join(PATIENCE_S)
    print(f"it had {at} characters, and {len(reader.text)} {time.monotonic() - started:.1f} s later")
    assert [one.finish_reason for one in readers] == ["length"] * 8
    assert not any(one.errors for one in readers)
    alone = Reader(url, reader.number)
    alone.join(PATIENCE_S)
    assert len(reader.text) > at
    assert reader.text == alone.text


def held_up(kills_target: bool) -> MigrationResult | None:
    """A move whose target stands still in the midst of it, and then one of the two is killed: -9.

    Returns:
        What the source says of it, unless that was killed.
    """
    groups, pairs = engines(), list[tuple[str, str]]()

    def is_parked() -> bool:
        for pair in (sorted(groups), sorted(groups)[::-1]):
            if ray.get(groups[pair[0]][1].snapshot.remote(), timeout=30).num_parked:
                pairs.append((pair[0], pair[1]))
        return bool(pairs)

    eventually(is_parked, 2 * PATIENCE_S)
    source, target = pairs[0]
    pids = {
        group: ray.get(groups[group][1].__ray_call__.remote(lambda self: os.getpid()), timeout=30)
        for group in groups
    }
    os.kill(pids[target], signal.SIGSTOP)
    try:
        order = None

        def is_under_way() -> bool:
            nonlocal order
            order = groups[source][1].migrate.remote(groups[target][0], target)
            return not ray.wait([order], timeout=1.0)[0]

        eventually(is_under_way)
        os.kill(pids[target if kills_target else source], signal.SIGKILL)
    finally:
        with contextlib.suppress(ProcessLookupError):  # that was killed
            os.kill(pids[target], signal.SIGCONT)
    return ray.get(order, timeout=PATIENCE_S) if kills_target else None


def free_again(num_groups: int) -> None:
    """Both groups are there, and nothing of a request is left in either."""

    def are_free() -> bool:
        found = [ray.get(engine.snapshot.remote(), timeout=30) for _, engine in engines().values()]
        used = [one.memory.kv + one.memory.balloon - one.memory.balloon_cached for one in found]
        return len(found) == num_groups and not any(used)

    eventually(are_free, PATIENCE_S)


@pytest.mark.parametrize("kills_target", [True, False])
def test_a_group_that_dies_in_the_midst_of_a_move_takes_its_own_requests_alone(
    url: str, kills_target: bool
) -> None:
    """The request that was on its way stays with the source until the target has said that it has it."""
    eventually(lambda: len(engines()) == 2, PATIENCE_S)
    readers = [Reader(url, number) for number in range(8)]
    result = held_up(kills_target)
    for one in readers:
        one.join(PATIENCE_S)
    assert not any(one.is_alive() for one in readers)
    whole = [one for one in readers if one.finish_reason == "length"]
    assert 1 <= len(whole) < 8
    assert not any(one.errors for one in whole)
    assert all(len(one.errors) == 1 and one.finish_reason is None for one in readers if one not in whole)
    if result is not None:
        assert result.outcome == "failed", result
        (stayed,) = [one for one in readers if result.request_id.startswith(f"reader{one.number}-")]
        assert stayed in whole
    free_again(2)
    alone = Reader(url, whole[0].number)
    alone.join(PATIENCE_S)
    assert whole[0].text == alone.text


@pytest.mark.skipif(
    (os.cpu_count() or 1) < 4, reason="its two nodes beside the cluster of the other tests want four cores"
)
def test_a_stream_moves_to_another_node(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Without memory that both nodes see: KV goes by TCP."""
    private = ["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    if subprocess.run(private, capture_output=True).returncode:
        pytest.skip("the second node's own /dev/shm takes a namespace that this machine does not give")
    told_at = tmp_path / "told.json"
    script = [
        sys.executable,
        "-m",
        "tests.serving.node_migration",
        str(tokenizer_dir),
        str(tmp_path),
        str(told_at),
    ]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(told_at.read_text())
    assert told["memories"] == 2, "each node has its own"
    assert told["at"] < told["characters"]
    assert told["is_same"]
    assert told["errors"] == []
