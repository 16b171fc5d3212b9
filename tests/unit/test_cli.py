"""The command line without Ray: what it prints, and the exit status."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster import cli, cli_render, launch
from cluster.client import Answer, Client, ClientError
from engine.control import HostSnapshot
from tests.unit.samples import MEMORY, snapshot

LAPTOP = Path(__file__).parents[2] / "deploy" / "laptop.yaml"


def test_a_server_stays_until_it_is_interrupted_whatever_else_signals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard = []

    def on_alarm(*_: object) -> None:
        heard.append(len(heard))
        if len(heard) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Client, "status", lambda self: {})
    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    try:
        cli._stay(Client("http://nowhere"))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert heard == [0, 1, 2]


def _run(*arguments: str) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, arguments, catch_exceptions=False)
    return result.exit_code, re.sub(r"\s+", " ", result.output)


class _Server(BaseHTTPRequestHandler):
    """Answers one prepared body for each path."""

    def do_GET(self) -> None:
        self._answer({"data": [{"id": "a"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/trim":
            self._answer(*_trimmed(body, self.headers.get("authorization")))
            return
        said = body["messages"][-1]["content"]
        if said == "refuse":
            self._answer({"error": {"message": "no, thank you"}}, 429)
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for event in _EVENTS[said]:
            self.wfile.write(f"data: {event if event == '[DONE]' else json.dumps(event)}\n\n".encode())

    def _answer(self, body: object, status: int = 200) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: object) -> None:
        """Quiet."""


def _trimmed(body: dict[str, Any], authorization: str | None) -> tuple[object, int]:
    """Model a has two engines, b one that fails, and c none."""
    if authorization != "Bearer root":
        return {"error": {"message": "this route takes an admin key"}}, 403
    given = 3 << 20 if body["drop_cache"] else 0
    engines = {"a": [_given(given), _given(1 << 30)], "b": [_given(None, "it ended")], "c": []}
    chosen = [body["model"]] if body["model"] else list(engines)
    models = [{"model_id": name, "engines": engines[name]} for name in chosen]
    if chosen == ["a"]:
        return {"models": models}, 200
    return {"models": models, "error": {"message": "1 of 3 engines failed"}}, 503


def _given(released: int | None, error: str | None = None) -> dict[str, object]:
    return {"released_bytes": released, "error": error}


def _text(text: str, reason: str | None = None) -> dict[str, object]:
    return {"choices": [{"delta": {"content": text}, "finish_reason": reason}]}


_USAGE = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}
_EVENTS = {
    "good": [_text("[bold]Hel"), _text("lo", "stop"), _USAGE, "[DONE]"],
    "cut": [_text("Hel")],
    "breaks": [_text("Hel"), {"error": {"message": "the engine died"}}, "[DONE]"],
}


@pytest.fixture
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_check_accepts_what_is_shipped() -> None:
    status, output = _run("check", str(LAPTOP))
    assert status == 0
    assert "smollm2-135m-instruct" in output
    assert "256 MiB" in output


def test_check_lists_every_fault(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(LAPTOP.read_text().replace("pool_bytes", "pool_byte").replace("port:", "prot:"))
    status, output = _run("check", str(path))
    assert status == 1
    assert "did you mean pool_bytes?" in output
    assert "did you mean port?" in output


def test_serve_wants_the_model_before_ray(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(LAPTOP.read_text().replace("SmolLM2-135M", "NoSuchModel"))
    status, output = _run("serve", str(path))
    assert status == 1
    assert "make model" in output
    assert "starting Ray" not in output


def test_serve_wants_the_gpus_before_it_deploys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "ray_running", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(launch, "require_port", lambda _: None)
    monkeypatch.setattr(launch, "node_gpus", lambda: [0.0])
    status, output = _run("serve", str(LAPTOP.with_name("one-node.yaml")))
    assert status == 1
    assert "error: GPUs asked for: llama-3.1-8b-instruct 1; there: none" in output
    assert "deploying" not in output


def test_serve_says_that_the_port_is_taken(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        path = tmp_path / "file.yaml"
        text = re.sub(r"model_source: .*", f"model_source: {model}", LAPTOP.read_text())
        path.write_text(text.replace("port: 8000", f"port: {port}"))
        status, output = _run("serve", str(path))
    assert status == 1
    assert f"port {port} on 127.0.0.1 cannot be used" in output


def test_chat_once_prints_the_answer_as_it_is(url: str) -> None:
    status, output = _run("chat", "--url", url, "--once", "good")
    assert status == 0
    assert "[bold]Hello" in output
    assert "5 tokens in, 2 out (stop)" in output


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("refuse", "HTTP 429: no, thank you"),
        ("cut", "closed the stream before its end"),
        ("breaks", "the engine died"),
    ],
)
def test_chat_fails_when_the_answer_does(url: str, prompt: str, reason: str) -> None:
    status, output = _run("chat", "--url", url, "--once", prompt)
    assert status == 1
    assert reason in output


def test_trim_says_what_each_engine_gave_back(url: str) -> None:
    status, output = _run("trim", "--url", url, "--api-key", "root", "--model", "a")
    assert (status, output) == (0, "a group 0: gave 0 B back a group 1: gave 1 GiB back ")
    status, output = _run("trim", "--url", url, "--api-key", "root", "--model", "a", "--drop-cache")
    assert (status, output) == (0, "a group 0: gave 3 MiB back a group 1: gave 1 GiB back ")


def test_trim_fails_where_an_engine_does_and_shows_the_others(url: str) -> None:
    status, output = _run("trim", "--url", url, "--api-key", "root")
    assert status == 1
    assert "a group 1: gave 1 GiB back" in output
    assert "b group 0: it ended" in output
    assert "c: no engine answers" in output


def test_trim_takes_its_own_key(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BALLONET_API_KEY", "root")
    status, output = _run("trim", "--url", url)
    assert (status, output) == (1, "error: HTTP 403: this route takes an admin key ")
    monkeypatch.setenv("BALLONET_ADMIN_API_KEY", "root")
    assert _run("trim", "--url", url, "--model", "a")[0] == 0


def test_no_server() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{probe.getsockname()[1]}"
    status, output = _run("status", "--url", nowhere)
    assert status == 1
    assert "no answer from" in output
    with pytest.raises(ClientError):
        Client(nowhere).models()


def _rendered(what: object) -> str:
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(what)
    return capture.get()


def test_the_bar_shows_every_chunk() -> None:
    head, bar, *legend = _rendered(cli_render.pool_picture(snapshot("a"))).splitlines()
    assert "100 chunks of 1 MiB, 80 MiB physical, 400 tokens of KV" in head
    assert "90 driver calls since start, 40 more beside the steps" in legend[-1]
    assert len(bar.strip()) == 64
    assert bar.count("█") == round(64 * MEMORY.kv / MEMORY.total)
    assert bar.count("~") == 2  # 3 of 100 chunks: small, but there
    assert bar.count("=") == round(64 * MEMORY.cached / MEMORY.total)
    assert "KV live 20 MiB" in legend[0]


def test_status_shows_what_is_outside_the_pool_and_the_hit_rate() -> None:
    shown = _rendered(cli_render.status_view({"a": [snapshot("a")]}))
    assert "80 MiB physical" in shown
    assert "KV cached 5 MiB" in shown
    assert "warm (free) 20 MiB" in shown
    outside = (
        "outside the pool: weights 7 MiB, CUDA graphs 3 MiB, workspaces 1 MiB, balloon on the host 6 MiB"
    )
    assert outside in shown
    assert "balloon: 6 MiB of 30 MiB (4 MiB cached), " in shown
    assert "prefix cache: 100 of 300 prompt tokens found (33.3%)" in shown


def test_status_is_silent_about_what_is_not_there() -> None:
    memory = replace(MEMORY, weight_bytes=0, graph_bytes=0, workspace_bytes=0, balloon=0)
    bare = replace(snapshot("a"), memory=memory, prefix_queries=0, prefix_hits=0)
    shown = _rendered(cli_render.pool_picture(bare))
    assert "outside" not in shown
    assert "prefix cache" not in shown


def test_cached_tokens_show_beside_the_prompts() -> None:
    assert "9 tokens in, 2 out" in cli_render.answer_figures(Answer("", "stop", 9, 2, 1.0, 2.0)).plain
    cached = cli_render.answer_figures(Answer("", "stop", 9, 2, 1.0, 2.0, 8)).plain
    assert "9 tokens in (8 cached), 2 out" in cached


def test_status_tells_the_ranks_and_the_node_of_a_group() -> None:
    hosts = [HostSnapshot(f"{node}123456789abcdef", 1 << 40, 1 << 39) for node in "ab"]
    two = replace(snapshot("m"), num_ranks=2, host=hosts[0])
    one = replace(snapshot("m"), host=hosts[1])
    shown = _rendered(cli_render.status_view({"m": [two, one, snapshot("m")]}))
    assert "m group 0 (2 ranks, memory of the first, node a1234567): 4 running" in shown
    assert "m group 1 (node b1234567): 4 running" in shown
    assert "m group 2: 4 running" in shown
    shown = _rendered(cli_render.status_view({"m": [two, two]}))
    assert "m group 1 (2 ranks, memory of the first): 4 running" in shown  # there is one node


def test_a_model_without_engines_is_named() -> None:
    assert "a: no engine answers" in _rendered(cli_render.status_view({"a": []}))


@pytest.mark.parametrize(("tokens", "total_s", "rate"), [(11, 3.0, 5.0), (1, 3.0, 0.0), (0, 1.0, 0.0)])
def test_rate_is_that_of_the_tokens_after_the_first(tokens: int, total_s: float, rate: float) -> None:
    assert Answer("", "stop", 1, tokens, 1.0, total_s).tokens_per_s == rate


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**30, "1 GiB"), (2**42, "4096 GiB")],
)
def test_sizes(num_bytes: int, text: str) -> None:
    assert cli_render.size(num_bytes) == text
