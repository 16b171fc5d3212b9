"""Sessions over HTTP: what a later turn sends, by what the server tells of its answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster import cli
from cluster.bench.client import Call, Target, send_all
from cluster.bench.named import named_workload
from cluster.bench.sessions import next_body_of
from cluster.bench.summary import Record
from cluster.bench.workload import BenchError
from tests.bench.models import write_llama_8b
from tests.unit.bench_server import DONE, FOUR_TOKENS, FakeServer, chat, ids, text, usage

CHATS = named_workload("demo-chats-4x3x96")  # each answer has 12 tokens
FRESH = CHATS.requests[0].prompt_tokens
ANSWER_IDS = list(range(700, 712))
WITH_IDS = [ids("a ", *ANSWER_IDS[:5]), ids("b", *ANSWER_IDS[5:], reason="length"), usage(84, 12), DONE]
WITHOUT = [text("said "), text("so", "length"), usage(84, 12), DONE]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    yield fake
    fake.close()


def _bench(server: FakeServer, *options: str) -> tuple[int, str, dict[str, Any]]:
    command = ["bench", "--base-url", server.url, "--disable-tqdm", "--workload", CHATS.name, *options]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, command, catch_exceptions=False)
    return result.exit_code, result.output, json.loads(result.output.strip().splitlines()[-1])


def _sessions(server: FakeServer, num_probes: int) -> dict[Any, list[dict[str, Any]]]:
    """The bodies of each session, by the first of its prompt."""
    found: dict[Any, list[dict[str, Any]]] = {}
    for body in server.bodies[num_probes:]:
        start = body["prompt"][:20] if "prompt" in body else body["messages"][0]["content"][:20]
        found.setdefault(start if isinstance(start, str) else tuple(start), []).append(body)
    return found


def test_a_completion_goes_on_with_the_token_ids_of_the_answer(server: FakeServer) -> None:
    server.script = WITH_IDS
    status, output, line = _bench(server)
    assert (status, line["options"]["history"]) == (0, "token_ids")
    assert "Sessions go on with their answers as token ids" in output
    assert (line["figure"]["completed"], line["figure"]["total_output_tokens"]) == (12, 144)
    sessions = _sessions(server, num_probes=1)
    assert len(sessions) == 4
    fresh = {tuple(CHATS.token_ids(request)) for request in CHATS.requests}
    for first, second, third in sessions.values():
        added = FRESH + len(ANSWER_IDS)
        assert second["prompt"][:added] == first["prompt"] + ANSWER_IDS
        assert third["prompt"][: 2 * added] == second["prompt"] + ANSWER_IDS
        assert {tuple(body["prompt"][-FRESH:]) for body in (first, second, third)} <= fresh
        assert {body["return_token_ids"] for body in (first, second, third)} == {True}
        assert third["max_tokens"] == 12


@pytest.mark.parametrize("refuses", [None, "return_token_ids"], ids=["ignored", "refused"])
def test_a_completion_goes_on_with_text_where_no_token_ids_come(
    server: FakeServer, refuses: str | None
) -> None:
    server.script, server.refuses = WITHOUT, refuses
    status, output, line = _bench(server)
    assert (status, line["options"]["history"]) == (0, "text")
    assert "Sessions go on with their answers as text" in output
    for first, second, third in _sessions(server, num_probes=2).values():
        assert len(first["prompt"].split()) == FRESH
        assert second["prompt"].startswith(first["prompt"] + "said so ")
        assert len(third["prompt"].split()) == 3 * FRESH + 2  # the answer's first word joins a prompt's last
        assert "return_token_ids" not in third


def test_a_chat_goes_on_with_its_messages(server: FakeServer) -> None:
    end = 'data: {"choices": [{"delta": {}, "finish_reason": "length"}]}\n\n'
    server.script = [chat(role="assistant", content=""), chat(content="well "), chat(content="yes"), end]
    server.script += [usage(84, 12), DONE]
    status, _, line = _bench(server, "--backend", "openai-chat")
    assert (status, line["options"]["history"]) == (0, "messages")
    for first, second, third in _sessions(server, num_probes=1).values():
        messages = third["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant"] * 2 + ["user"]
        assert messages[:3] == second["messages"]
        assert messages[:1] == first["messages"]
        assert messages[1]["content"] == "well yes"
        assert len(messages[4]["content"].split()) == FRESH
        assert third["max_completion_tokens"] == 12


def test_workloads_without_sessions_ask_for_no_token_ids(server: FakeServer) -> None:
    _, output, line = _bench(server, "--workload", "demo-8x64+32")
    assert line["options"]["history"] is None
    assert "Sessions" not in output
    assert not any("return_token_ids" in body for body in server.bodies)


def test_turns_behind_a_failed_one_fail_with_its_reason(server: FakeServer) -> None:
    server.script, server.fails_after = WITH_IDS, 1 + 4  # the probe and the first turns
    status, output, line = _bench(server)
    assert status == 1
    assert (line["figure"]["completed"], line["figure"]["failed"]) == (4, 8)
    assert len(server.bodies) == 1 + 4 + 4
    assert "not sent, for the turn before it failed: HTTP 500" in output


def test_an_answer_without_all_of_its_ids_ends_its_session() -> None:
    body, record = b'{"prompt": [1]}', Record(0.0, 1, output_tokens=2, token_ids=[5])
    make = next_body_of("token_ids", CHATS, CHATS.requests[4])
    with pytest.raises(BenchError, match="came with 1 token ids for 2 tokens"):
        make(body, record)


def test_the_ceiling_of_sessions_is_of_what_was_done(server: FakeServer, tmp_path: Path) -> None:
    server.script = WITH_IDS
    _, _, line = _bench(server, "--model-config", str(write_llama_8b(tmp_path)), "--gpu", "h100")
    assert line["ceiling"]["read_bytes"] > 3 * 12 * 15e9  # three answers of 12 tokens, one after another
    assert line["share"]["of_floor"] > 0


def test_cached_tokens_are_counted_where_the_server_tells_them(server: FakeServer) -> None:
    counts = {"prompt_tokens": 84, "completion_tokens": 12, "prompt_tokens_details": {"cached_tokens": 64}}
    told = "data: " + json.dumps({"choices": [], "usage": counts}) + "\n\n"
    server.script = [*WITH_IDS[:2], told, DONE]
    assert _bench(server)[2]["figure"]["total_cached_tokens"] == 12 * 64
    server.script = WITH_IDS
    assert _bench(server)[2]["figure"]["total_cached_tokens"] == 0


def test_a_turn_is_sent_when_the_answer_has_ended_and_its_reader_has_thought(server: FakeServer) -> None:
    first = Call(0.0, 1, json.dumps({"script": FOUR_TOKENS}).encode())
    later = Call(0.0, 1, b"", follows=0, think_s=0.2, next_body=lambda body, record: body)
    run = send_all(Target(server.url + "/v1/completions"), [first, later])
    assert run.places == [0, 1]
    assert run.records[1].start_s >= run.records[0].end_s + 0.2
    assert run.late_s[1] == pytest.approx(run.records[1].start_s - run.records[0].end_s - 0.2)
