"""kill -9 of one process after the other: who notices, who does not, and how soon all is well again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.client import Client
from tests.serving.conftest import ROOT
from tests.serving.fake_engine import CUT, FATAL, LATE, POISON, QUICK, SLOW, STUCK, UNLUCKY, UNSENT
from tests.serving.processes import descendants, engines, eventually, kill, processes

pytestmark = pytest.mark.ray

PAIR = "fake:TpGroup-pair"
Record = Callable[[str, Any], None]


def _body(order: int, max_tokens: int, model: str, stream: bool = True) -> dict[str, Any]:
    return {"model": model, "prompt": [order], "max_tokens": max_tokens, "stream": stream}


def _events(base_url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """All events of one stream, which must end in good order."""
    lines = httpx.post(f"{base_url}/v1/completions", json=body, timeout=60).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def _num_tokens(events: list[dict[str, Any]]) -> int:
    return sum(event["choices"][0]["text"].count("word") for event in events if event.get("choices"))


def _groups(base_url: str, model: str = "pair") -> int:
    return len(Client(base_url).status()[model])


@pytest.fixture
def pair_url(base_url: str) -> Iterator[str]:
    """Both groups are up, before and after."""
    eventually(lambda: _groups(base_url) == len(engines(PAIR)) == 2)
    yield base_url
    eventually(lambda: _groups(base_url) == len(engines(PAIR)) == 2)


def _stream_on_each_group(
    url: str, pool: ThreadPoolExecutor, count: int, tokens: int, order: int = SLOW
) -> list[Future[Any]]:
    futures = [pool.submit(_events, url, _body(order, tokens, "pair")) for _ in range(count)]

    def spread() -> bool:
        running = [group.num_running for group in Client(url).status()["pair"]]
        return len(running) == 2 and sum(running) == count and min(running) >= 1

    eventually(spread)
    return futures


def test_an_engine_that_is_killed_ends_its_own_streams_alone(pair_url: str, record_property: Record) -> None:
    with ThreadPoolExecutor(8) as pool:
        streams = _stream_on_each_group(pair_url, pool, 6, 100)
        os.kill(next(iter(engines(PAIR))), signal.SIGKILL)
        answers = [stream.result(60) for stream in streams]
    failed = [events for events in answers if "error" in events[-1]]
    assert 1 <= len(failed) <= 5
    for events in answers:
        if events in failed:
            assert events[-1]["error"]["code"] == "engine_unavailable"
            assert 0 < _num_tokens(events) < 100
        else:
            assert _num_tokens(events) == 100
    record_property("rebuilt_s", eventually(lambda: _groups(pair_url) == len(engines(PAIR)) == 2))


def test_a_replica_that_is_killed_takes_its_engine_along(pair_url: str, record_property: Record) -> None:
    """Its engine would hold the GPU that the next group needs. Whoever had no token yet is served."""
    before = set(engines(PAIR))
    with ThreadPoolExecutor(12) as pool:
        streams = _stream_on_each_group(pair_url, pool, 6, 100)
        waiting = [pool.submit(_events, pair_url, _body(LATE, 5, "pair")) for _ in range(6)]
        eventually(lambda: sum(group.num_running for group in Client(pair_url).status()["pair"]) == 12)
        os.kill(min(processes(f"ray::ServeReplica:{PAIR}")), signal.SIGKILL)
        gone_s = eventually(lambda: len(before & descendants(os.getpid())) == 1)
        answers = [stream.result(60) for stream in streams]
        assert [_num_tokens(answer.result(60)) for answer in waiting] == [5] * 6
    failed = [events for events in answers if "error" in events[-1]]
    assert 1 <= len(failed) <= 5
    assert {events[-1]["error"]["code"] for events in failed} == {"engine_unavailable"}
    assert all(_num_tokens(events) == 100 for events in answers if events not in failed)
    record_property("engine_gone_s", gone_s)
    record_property("rebuilt_s", eventually(lambda: _groups(pair_url) == len(engines(PAIR)) == 2))


def test_who_does_not_stream_gets_a_status(pair_url: str) -> None:
    answer = httpx.post(f"{pair_url}/v1/completions", json=_body(FATAL, 5, "pair", stream=False), timeout=60)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "engine_unavailable"
    assert "process ended" in answer.json()["error"]["message"]


def test_a_request_without_a_token_goes_to_another_group(pair_url: str) -> None:
    before = set(engines(PAIR))
    events = _events(pair_url, _body(UNLUCKY, 5, "pair"))
    assert _num_tokens(events) == 5
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert len(before - set(engines(PAIR))) == 1


def test_a_request_that_kills_engines_is_given_two_of_them(pair_url: str) -> None:
    before = set(engines(PAIR))
    answer = httpx.post(f"{pair_url}/v1/completions", json=_body(POISON, 5, "pair", stream=False), timeout=60)
    assert answer.status_code == 503
    eventually(lambda: not before & set(engines(PAIR)))
    eventually(lambda: _groups(pair_url) == 2)


def test_a_step_loop_that_stands_still_is_replaced(pair_url: str) -> None:
    before = set(engines(PAIR))
    events = _events(pair_url, _body(STUCK, 5, "pair"))
    assert events[-1]["error"]["code"] == "engine_unavailable"
    assert "no step has ended" in events[-1]["error"]["message"]
    assert _num_tokens(events) == 1
    eventually(lambda: len(set(engines(PAIR)) - before) == 1)


def test_a_network_that_is_cut_between_engine_and_ingress_ends_its_streams(
    pair_url: str, record_property: Record
) -> None:
    """Ray's own connections hold. The engine misses the ingress' heartbeats, and says so by the open call."""
    before = set(engines(PAIR))
    with ThreadPoolExecutor(2) as pool:
        started = time.monotonic()
        cut = pool.submit(_events, pair_url, _body(CUT, 400, "pair"))
        whole = pool.submit(_events, pair_url, _body(SLOW, 60, "pair"))
        events = cut.result(60)
        record_property("stream_ended_s", time.monotonic() - started - 0.5)
        assert _num_tokens(whole.result(60)) == 60
    assert events[-1]["error"]["code"] == "engine_unavailable"
    assert 0 < _num_tokens(events) < 400
    assert _num_tokens(_events(pair_url, _body(UNSENT, 5, "pair"))) == 5  # no token had come: once more
    eventually(lambda: sum(group.num_running for group in Client(pair_url).status()["pair"]) == 0)
    assert set(engines(PAIR)) == before


def test_an_ingress_that_is_killed_takes_its_requests_out_of_the_engines(
    base_url: str, record_property: Record
) -> None:
    def cancelled() -> int:
        (group,) = Client(base_url).status()["fake"]
        return dict(group.finished).get("cancelled", 0)  # type: ignore[call-overload]

    eventually(lambda: _groups(base_url, "fake") == 1)
    before = cancelled()
    with httpx.stream(
        "POST", f"{base_url}/v1/completions", json=_body(SLOW, 500, "fake"), timeout=60
    ) as response:
        lines = response.iter_lines()
        next(lines)
        kill("ray::ServeReplica:fake:Ingress")
        rest: list[str] = []
        with contextlib.suppress(httpx.HTTPError):
            rest.extend(lines)
    assert "data: [DONE]" not in rest  # the connection breaks: no end in good order
    body = _body(QUICK, 2, "fake", stream=False)
    record_property(
        "rebuilt_s",
        eventually(
            lambda: httpx.post(f"{base_url}/v1/completions", json=body, timeout=10).status_code == 200
        ),
    )
    eventually(lambda: cancelled() == before + 1)


@pytest.mark.parametrize("title", ["ray::ServeReplica:fake:Controller", "ray::ServeController"])
def test_requests_do_not_notice_a_dead_controller(base_url: str, title: str) -> None:
    eventually(lambda: len(processes(title)) == 1)
    dead = processes(title)
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(_events, base_url, _body(SLOW, 60, "fake"))
        eventually(lambda: Client(base_url).status()["fake"][0].num_running == 1)
        kill(title)
        quick = httpx.post(f"{base_url}/v1/completions", json=_body(QUICK, 2, "fake", False), timeout=30)
        assert quick.status_code == 200
        assert _num_tokens(stream.result(60)) == 60
    eventually(lambda: len(processes(title) - dead) == 1)


def test_a_node_that_is_lost_takes_its_own_requests_alone(
    tokenizer_dir: Path, tmp_path: Path, record_property: Record
) -> None:
    told_at = tmp_path / "told.json"
    script = [sys.executable, "-m", "tests.serving.node_loss", str(tokenizer_dir), str(told_at)]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(told_at.read_text())
    assert set(told["ends"]) == {"engine_unavailable", "whole"}
    assert told["quick"] == ["whole"]
    for name in ("streams_ended_s", "quick_s", "rebuilt_s"):
        record_property(name, told[name])
