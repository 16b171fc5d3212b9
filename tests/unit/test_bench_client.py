"""The load generator against a small server that answers as it is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.bench.client import Call, Run, Target, send_all
from tests.unit.bench_server import DONE, FOUR_TOKENS, FakeServer, chat, text, usage


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    yield fake
    fake.close()


def _send(server: FakeServer, *scripts: list[Any], concurrency: int | None = None) -> Run:
    calls = [Call(0.0, 5, json.dumps({"script": script}).encode()) for script in scripts]
    return send_all(Target(server.url + "/v1/completions"), calls, concurrency)


def test_tokens_are_counted_by_usage_and_gaps_by_delta(server: FakeServer) -> None:
    pause_s = 0.4  # far more than a busy machine delays the reading
    script = [text("a"), pause_s, text("b c"), text("d", "length"), usage(7, 4), DONE]
    (record,) = _send(server, script).records
    assert record.succeeded
    assert (record.prompt_tokens, record.output_tokens) == (7, 4)
    assert len(record.delta_times_s) == 3
    assert record.gaps_s[0] > 0.1
    assert record.tpot_s == pytest.approx((record.end_s - record.delta_times_s[0]) / 3)


def test_without_usage_deltas_count(server: FakeServer) -> None:
    (record,) = _send(server, [text("a"), text("b"), text("", "stop"), DONE]).records
    assert (record.succeeded, record.prompt_tokens, record.output_tokens) == (True, 5, 2)
    assert (record.counted, record.pieces) == (False, ["a", "b"])


def test_chat_deltas_without_text_count_after_the_role(server: FakeServer) -> None:
    """Bytes that form no character yet are a token, in a chat as in a completion."""
    end = 'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n'
    script = [chat(role="assistant", content=""), chat(content=""), chat(content="x"), end]
    (record,) = _send(server, [*script, usage(3, 2), DONE]).records
    assert (record.succeeded, len(record.delta_times_s)) == (True, 2)


def test_chat_deltas_count_from_the_first_text(server: FakeServer) -> None:
    script = [chat(role="assistant", content=""), 0.1, chat(reasoning_content="x"), chat(content="y")]
    (record,) = _send(server, [*script, usage(3, 2), DONE]).records
    assert len(record.delta_times_s) == 2
    assert record.ttft_s >= 0.1


def test_events_may_be_cut_anywhere_and_mixed_with_comments(server: FakeServer) -> None:
    whole = ": ping\r\n\r\n" + (text("ä") + text("b", "length")).replace("\n", "\r\n") + usage(1, 2) + DONE
    pieces = [part for char in whole for part in (char, 0.0)]
    (record,) = _send(server, pieces).records
    assert (record.succeeded, len(record.delta_times_s), record.output_tokens) == (True, 2, 2)


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ([503, "busy"], "HTTP 503 Service Unavailable: busy"),
        ([429, '{"error": {"message": "too many"}}'], "HTTP 429 Too Many Requests: too many"),
        ([500, '{"error": "odd"}'], 'HTTP 500 Internal Server Error: {"error": "odd"}'),
        ([503, '{"error": {"code": 500}}'], 'HTTP 503 Service Unavailable: {"error": {"code": 500}}'),
        ([503, '{"error": {"message": null}}'], 'HTTP 503 Service Unavailable: {"error": {"message": null}}'),
        ([502, "[1]"], "HTTP 502 Bad Gateway: [1]"),
        ([text("a"), 'data: {"choices": [null]}\n\n', DONE], "the answer cannot be read: AttributeError"),
        ([text("a"), 'data: {"usage": "x"}\n\n', DONE], "the answer cannot be read: AttributeError"),
        (
            [text("a"), 'data: {"usage": {"completion_tokens": "4"}}\n\n', DONE],
            "usage has completion_tokens '4'",
        ),
        ([text("a"), 'data: {"error": {"message": null, "code": 7}}\n\n', DONE], "'code': 7"),
        ([{"choices": [{"text": "hi"}]}], "no event stream: its Content-Type is application/json"),
        ([text("a"), "drop"], "ClientPayloadError"),
        ([text("a"), text("b")], "the stream broke off after 2 deltas"),
        ([DONE], "the stream ended without a token"),
        (["data: {oops\n\n"], "JSONDecodeError"),
        (["data: [1]\n\n", DONE], "no object"),
        ([text("a"), 'data: {"error": {"message": "engine died"}}\n\n', DONE], "engine died"),
    ],
)
def test_failures_are_told_apart(server: FakeServer, script: list[Any], error: str) -> None:
    good, bad = _send(server, FOUR_TOKENS, script).records
    assert good.succeeded
    assert not bad.succeeded
    assert error in str(bad.error)


def test_a_server_that_is_not_there() -> None:
    (record,) = send_all(Target("http://127.0.0.1:9/v1/completions"), [Call(0.0, 1, b"{}")]).records
    assert "ClientConnectorError" in str(record.error)


def test_arrivals_and_the_limit_on_concurrency(server: FakeServer) -> None:
    calls = [Call(0.1 * n, 1, b"{}") for n in range(4)]
    run = send_all(Target(server.url + "/v1/completions"), calls)
    starts = [record.start_s for record in run.records]
    assert all(start >= call.arrival_s for start, call in zip(starts, calls, strict=True))
    assert run.late_s == pytest.approx([s - c.arrival_s for s, c in zip(starts, calls, strict=True)])
    server.most_open = 0
    _send(server, *[FOUR_TOKENS] * 6, concurrency=2)
    assert server.most_open == 2


def test_a_proxy_of_the_environment_is_used(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake server as the proxy: it gets a request for a host that does not exist."""
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "localhost")
    (record,) = send_all(Target("http://nowhere.invalid/v1/completions"), [Call(0.0, 1, b"{}")]).records
    assert (record.error, record.succeeded) == (None, True)
    assert server.headers[0]["Host"] == "nowhere.invalid"


def test_a_host_without_a_proxy_is_asked_itself(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert _send(server, FOUR_TOKENS).records[0].succeeded
