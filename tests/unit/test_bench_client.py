"""The load generator and the `bench` command against a small server that answers as it is told."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from typer.testing import CliRunner

from cluster import cli
from cluster.bench.client import Call, Run, Target, send_all
from tests.bench.models import write_llama_8b

ROOT = Path(__file__).parents[2]
DONE = "data: [DONE]\n\n"


def _text(text: str, reason: str | None = None) -> str:
    return "data: " + json.dumps({"choices": [{"text": text, "finish_reason": reason}]}) + "\n\n"


def _usage(prompt: int, completion: int) -> str:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion}
    return "data: " + json.dumps({"choices": [], "usage": usage}) + "\n\n"


def _chat(**delta: str) -> str:
    return "data: " + json.dumps({"choices": [{"delta": delta, "finish_reason": None}]}) + "\n\n"


class FakeServer:
    """An HTTP server in a thread. The `script` of a request says what it gets.

    Attributes:
        fails_after: requests after which every further one gets a 500; None for never.
        bodies, headers: of the requests that came.
        most_open: most requests that were being answered at once.
    """

    def __init__(self) -> None:
        self.fails_after: int | None = None
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.open = self.most_open = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._runner, self.url = self._call(self._start())

    def close(self) -> None:
        self._call(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _start(self) -> tuple[web.AppRunner, str]:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._post)
        app.router.add_post("/v1/chat/completions", self._post)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        return runner, f"http://127.0.0.1:{port}"

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "first"}, {"id": "second"}]})

    async def _post(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            return await self._answer(request, body.get("script", ["4 tokens"]))
        finally:
            self.open -= 1

    async def _answer(self, request: web.Request, script: list[Any]) -> web.StreamResponse:
        if self.fails_after is not None and len(self.bodies) > self.fails_after:
            script = [500, "boom"]
        if isinstance(script[0], int):
            return web.Response(status=script[0], text=script[1])
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for part in _FOUR_TOKENS if script == ["4 tokens"] else script:
            if part == "drop":
                assert request.transport is not None
                request.transport.close()
                return response
            if isinstance(part, float):
                await asyncio.sleep(part)
            else:
                await response.write(part.encode())
        return response


_FOUR_TOKENS = [_text("a"), 0.05, _text("b c"), _text("d", "length"), _usage(7, 4), DONE]


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
    script = [_text("a"), pause_s, _text("b c"), _text("d", "length"), _usage(7, 4), DONE]
    (record,) = _send(server, script).records
    assert record.succeeded
    assert (record.prompt_tokens, record.output_tokens) == (7, 4)
    assert len(record.delta_times_s) == 3
    assert record.gaps_s[0] > 0.1
    assert record.tpot_s == pytest.approx((record.end_s - record.delta_times_s[0]) / 3)


def test_without_usage_deltas_count(server: FakeServer) -> None:
    (record,) = _send(server, [_text("a"), _text("b"), _text("", "stop"), DONE]).records
    assert (record.succeeded, record.prompt_tokens, record.output_tokens) == (True, 5, 2)


def test_chat_deltas_count_from_the_first_text(server: FakeServer) -> None:
    script = [_chat(role="assistant", content=""), 0.1, _chat(reasoning_content="x"), _chat(content="y")]
    (record,) = _send(server, [*script, _usage(3, 2), DONE]).records
    assert len(record.delta_times_s) == 2
    assert record.ttft_s >= 0.1


def test_events_may_be_cut_anywhere_and_mixed_with_comments(server: FakeServer) -> None:
    whole = ": ping\r\n\r\n" + (_text("ä") + _text("b", "length")).replace("\n", "\r\n") + _usage(1, 2) + DONE
    pieces = [part for char in whole for part in (char, 0.0)]
    (record,) = _send(server, pieces).records
    assert (record.succeeded, len(record.delta_times_s), record.output_tokens) == (True, 2, 2)


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ([503, "busy"], "HTTP 503 Service Unavailable: busy"),
        ([429, '{"error": {"message": "too many"}}'], "HTTP 429 Too Many Requests: too many"),
        ([500, '{"error": "odd"}'], 'HTTP 500 Internal Server Error: {"error": "odd"}'),
        ([_text("a"), "drop"], "ClientPayloadError"),
        ([_text("a"), _text("b")], "the stream broke off after 2 deltas"),
        ([DONE], "the stream ended without a token"),
        (["data: {oops\n\n"], "JSONDecodeError"),
        (["data: [1]\n\n", DONE], "no object"),
        ([_text("a"), 'data: {"error": {"message": "engine died"}}\n\n', DONE], "engine died"),
    ],
)
def test_failures_are_told_apart(server: FakeServer, script: list[Any], error: str) -> None:
    good, bad = _send(server, _FOUR_TOKENS, script).records
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
    _send(server, *[_FOUR_TOKENS] * 6, concurrency=2)
    assert server.most_open == 2


def _bench(server: FakeServer | None, *options: str, **environment: str) -> tuple[int, str]:
    url = ["--base-url", server.url] if server else []
    runner = CliRunner(env={"COLUMNS": "200", **environment})
    small = ["--num-prompts", "3", "--random-input-len", "5", "--random-output-len", "4", "--disable-tqdm"]
    result = runner.invoke(cli.app, ["bench", *url, *small, *options], catch_exceptions=False)
    return result.exit_code, result.output


def test_the_command_prints_the_block_and_ends_in_json(server: FakeServer, tmp_path: Path) -> None:
    status, output = _bench(
        server, "--goodput", "ttft:60000", "tpot:60000", "--save-result", "--result-dir", str(tmp_path),
        OPENAI_API_KEY="secret",
    )  # fmt: skip
    assert status == 0, output
    assert "Successful requests:                     3" in output
    assert "SLO attainment (%):                      100.00" in output
    line = json.loads(output.strip().splitlines()[-1])
    assert (line["figure"]["completed"], line["figure"]["total_output_tokens"]) == (3, 12)
    assert line["model"] == "first"
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["completed"] == 3
    assert server.headers[0]["Authorization"] == "Bearer secret"
    body = server.bodies[1]
    assert len(body["prompt"]) == 5
    assert (body["max_tokens"], body["ignore_eos"], body["temperature"], body["stream"]) == (
        4,
        True,
        0.0,
        True,
    )


def test_chat_sends_words_and_extra_fields(server: FakeServer) -> None:
    status, _ = _bench(
        server, "--backend", "openai-chat", "--model", "second", "--extra-body", '{"top_p": 0.5}',
        "--no-ignore-eos",
    )  # fmt: skip
    assert status == 0
    body = server.bodies[-1]
    assert (body["model"], body["top_p"], "ignore_eos" in body) == ("second", 0.5, False)
    assert len(body["messages"][0]["content"].split()) == 5


def test_a_run_stands_beside_its_ceiling(server: FakeServer, tmp_path: Path) -> None:
    write_llama_8b(tmp_path)
    status, output = _bench(server, "--model-config", str(tmp_path), "--gpu", "h100")
    line = json.loads(output.strip().splitlines()[-1])
    assert status == 0
    assert line["gpu"] == "NVIDIA H100 80GB HBM3"
    assert line["ceiling"]["read_bytes"] > 4 * 15e9  # the weights for the prompts and three more tokens
    assert 0 < line["share"]["of_floor"] <= line["share"]["of_phases"]


def test_a_failing_test_request_ends_the_command(server: FakeServer) -> None:
    status, output = _bench(server, "--extra-body", '{"script": [404, "no such model"]}')
    assert status == 1
    assert "the test request to" in output
    assert "no such model" in output
    assert len(server.bodies) == 1


def test_failures_are_counted_and_the_first_is_told(server: FakeServer) -> None:
    server.fails_after = 2  # the test request and one more
    status, output = _bench(server)
    assert status == 0
    assert "2 of 3 requests failed; the first said: HTTP 500 Internal Server Error: boom" in output
    assert "Failed requests:                         2" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset-name", "wikipedia"], "--dataset-name must be one of random, sharegpt"),
        (["--dataset-name", "azure"], "--dataset-name azure needs --dataset-path"),
        (["--dataset-name", "azure", "--dataset-path", "/nowhere"], "/nowhere cannot be read"),
        (["--backend", "tgi"], "--backend must be one of"),
        (["--goodput", "speed:3"], "--goodput 'speed:3'"),
        (["stray"], "'stray' belongs to no option"),
        (["--num-prompts", "0"], "--num-prompts must be at least 1"),
        (["--max-concurrency", "0"], "--max-concurrency must be at least 1"),
        (["--request-rate", "0"], "--request-rate must be positive"),
        (["--percentile-metrics", "ttft,magic"], "not magic"),
        (["--metric-percentiles", "99,x"], "--metric-percentiles must be numbers"),
        (["--extra-body", "[1]"], "--extra-body must be a JSON object"),
        (["--extra-body", "{"], "--extra-body is not JSON"),
        (["--header", "plain"], "--header must be KEY=VALUE"),
        (["--workload", "nope"], "no workload is called 'nope'"),
        (["--gpu", "abacus"], "--gpu must be one of h100"),
        (["--model-config", "/nowhere", "--gpu", "h100"], "--model-config /nowhere cannot be read"),
        (["--gpu", "h100"], "--model-config and --gpu belong together"),
        (["--base-url", "http://127.0.0.1:9"], "no answer from"),
    ],
)
def test_bad_options_are_named_before_anything_is_sent(options: list[str], message: str) -> None:
    status, output = _bench(None, *options)
    assert status == 1
    assert message in " ".join(output.split())


def test_ctrl_c_prints_what_there_is(server: FakeServer) -> None:
    command = [
        sys.executable,
        "-c",
        "from cluster.cli import main; main()",
        "bench",
        "--base-url",
        server.url + "/v1",
    ]
    command += ["--num-prompts", "50", "--request-rate", "10", "--random-input-len", "5", "--disable-tqdm"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ)
    give_up = time.monotonic() + 60
    while len(server.bodies) < 8 and time.monotonic() < give_up:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted:" in output
    figure = json.loads(output.strip().splitlines()[-1])["figure"]
    assert 1 <= figure["completed"] < 50
    assert figure["failed"] == 0
