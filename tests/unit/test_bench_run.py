"""The `bench` command, from its options to the last line it prints."""

from __future__ import annotations

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
from typer.testing import CliRunner

from cluster import cli
from tests.bench.models import write_llama_8b
from tests.unit.bench_server import DONE, FOUR_TOKENS, FakeServer, text, usage

ROOT = Path(__file__).parents[2]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    yield fake
    fake.close()


def _bench(server: FakeServer | None, *options: str, **environment: str) -> tuple[int, str]:
    url = ["--base-url", server.url] if server else []
    runner = CliRunner(env={"COLUMNS": "200", **environment})
    small = ["--num-prompts", "3", "--random-input-len", "5", "--random-output-len", "4"]
    if "--workload" in options:
        small = []
    elif "--dataset-name" in options:
        small = small[:2]
    command = ["bench", *url, "--disable-tqdm", *small, *options]
    result = runner.invoke(cli.app, command, catch_exceptions=False)
    return result.exit_code, result.output


def _line(output: str) -> dict[str, Any]:
    line = json.loads(output.strip().splitlines()[-1])
    assert isinstance(line, dict)
    return line


def _start(server: FakeServer, *options: str) -> subprocess.Popen[str]:
    """The command in a process of its own, which can get a Ctrl-C."""
    code = [sys.executable, "-c", "from cluster.cli import main; main()", "bench"]
    command = [*code, "--base-url", server.url + "/v1", "--random-input-len", "5", "--disable-tqdm", *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ)


def _wait_for_requests(server: FakeServer, count: int) -> None:
    give_up = time.monotonic() + 60
    while len(server.bodies) < count and time.monotonic() < give_up:
        time.sleep(0.05)
    assert len(server.bodies) >= count


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
    assert (body["max_tokens"], body["ignore_eos"], body["stream"]) == (4, True, True)
    assert "temperature" not in body


def test_chat_sends_words_and_extra_fields(server: FakeServer) -> None:
    status, _ = _bench(
        server, "--backend", "openai-chat", "--model", "second", "--extra-body", '{"top_p": 0.5}',
        "--no-ignore-eos", "--temperature", "0",
    )  # fmt: skip
    assert status == 0
    body = server.bodies[-1]
    assert (body["model"], body["top_p"], "ignore_eos" in body) == ("second", 0.5, False)
    assert len(body["messages"][0]["content"].split()) == 5
    assert (body["max_completion_tokens"], body["temperature"], "max_tokens" in body) == (4, 0.0, False)


def test_a_run_stands_beside_its_ceiling(server: FakeServer, tmp_path: Path) -> None:
    write_llama_8b(tmp_path)
    status, output = _bench(server, "--model-config", str(tmp_path), "--gpu", "h100")
    line = json.loads(output.strip().splitlines()[-1])
    assert status == 0
    assert line["gpu"] == "NVIDIA H100 80GB HBM3"
    assert line["ceiling"]["read_bytes"] > 4 * 15e9  # the weights for the prompts and three more tokens
    assert 0 < line["share"]["of_floor"] <= line["share"]["of_phases"]


def test_the_ceiling_is_of_the_work_that_was_done(server: FakeServer, tmp_path: Path) -> None:
    """One request of 3 came through: the weights are read for its prompt and three more tokens."""
    write_llama_8b(tmp_path)
    server.fails_after = 2
    _, output = _bench(
        server, "--random-output-len", "900", "--model-config", str(tmp_path), "--gpu", "h100"
    )  # fmt: skip
    line = _line(output)
    assert (line["figure"]["completed"], line["figure"]["total_output_tokens"]) == (1, 4)
    assert line["ceiling"]["read_bytes"] < 5 * 16e9  # 900 tokens would read 14e12
    server.fails_after = 1
    server.bodies.clear()
    _, output = _bench(server, "--model-config", str(tmp_path), "--gpu", "h100")
    assert (_line(output)["ceiling"], _line(output)["share"]) == (None, None)


def test_a_failing_test_request_ends_the_command(server: FakeServer) -> None:
    status, output = _bench(server, "--extra-body", '{"script": [404, "no such model"]}')
    assert status == 1
    assert "the test request to" in output
    assert "no such model" in output
    assert len(server.bodies) == 1


def test_failures_are_counted_and_the_first_is_told(server: FakeServer) -> None:
    server.fails_after = 2  # the test request and one more
    status, output = _bench(server)
    assert status == 1
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
        (["--vocab-size", "0"], "--vocab-size must be at least 1"),
        (
            ["--dataset-name", "sharegpt", "--sharegpt-output-len", "0"],
            "--sharegpt-output-len must be at least 1",
        ),
        (["--num-warmups", "-1"], "--num-warmups must be at least 0"),
        (["--ready-check-timeout-sec", "-1"], "--ready-check-timeout-sec must be at least 0"),
        (
            ["--workload", "demo-8x64+32", "--num-prompts", "2", "--seed", "9"],
            "--num-prompts, --seed: without effect on --workload demo-8x64+32",
        ),
        (["--dataset-path", "x"], "--dataset-path: without effect on --dataset-name random"),
        (["--self-timed"], "--self-timed: without effect on --dataset-name random"),
        (
            ["--dataset-name", "azure", "--random-input-len", "9"],
            "--random-input-len: without effect on --dataset-name azure",
        ),
        (["--metadata", "a=1", "b=2", "--header", "c=3"], "'b=2' may belong to --header or --metadata"),
        (["--metadata", "a=1", "stray"], "'stray' belongs to no option"),
        (["--save-result", "--result-dir", "/dev/null/r"], "--result-dir /dev/null/r cannot be made"),
        (["--rival", "/nowhere"], "--rival /nowhere cannot be read"),
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
    ],
)
def test_bad_options_are_named_before_anything_is_sent(
    server: FakeServer, options: list[str], message: str
) -> None:
    status, output = _bench(server, *options)
    assert status == 2
    assert message in " ".join(output.split())
    assert server.bodies == []


def test_a_server_that_does_not_answer_is_no_bad_option() -> None:
    status, output = _bench(None, "--base-url", "http://127.0.0.1:9")
    assert status == 1
    assert "no answer from" in output


def test_ctrl_c_prints_what_there_is(server: FakeServer) -> None:
    process = _start(server, "--num-prompts", "50", "--request-rate", "10")
    _wait_for_requests(server, 8)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted:" in output
    figure = _line(output)["figure"]
    assert 1 <= figure["completed"] < 50
    assert figure["failed"] == 0


def test_ctrl_c_in_the_warm_up_ends_it(server: FakeServer) -> None:
    server.hangs_after = 2
    process = _start(server, "--num-prompts", "3", "--num-warmups", "4")
    _wait_for_requests(server, 3)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Starting main benchmark run" not in output


def test_no_prompt_is_sent_before_it_is_measured(server: FakeServer) -> None:
    status, _ = _bench(server, "--num-warmups", "4")
    assert status == 0
    prompts = [tuple(body["prompt"]) for body in server.bodies]
    assert len(prompts) == 1 + 4 + 3
    assert len(set(prompts)) == len(prompts)
    assert {len(prompt) for prompt in prompts} == {5}


def test_the_result_says_what_was_run(server: FakeServer, tmp_path: Path) -> None:
    _, output = _bench(
        server, "--input-len", "6", "--request-rate", "inf", "--seed", "5", "--extra-body", '{"top_p": 0.5}',
        "--metadata", "completed=9", "tp=2", "--save-result", "--append-result",
        "--result-dir", str(tmp_path / "new"), "--result-filename", "r.json", "--label", "mine",
        OPENAI_API_KEY="secret",
    )  # fmt: skip
    line = _line(output)
    told = line["options"]
    assert (told["num_prompts"], told["random_input_len"], told["random_output_len"]) == (3, 6, 4)
    assert (told["seed"], told["request_rate"], told["burstiness"], told["ignore_eos"]) == (
        5,
        "inf",
        1.0,
        True,
    )
    assert (told["extra_body"], told["temperature"]) == ({"top_p": 0.5}, None)
    assert "secret" not in output.lower()
    assert line["versions"]["server"] == "9.8.7"
    saved = json.loads((tmp_path / "new" / "r.json").read_text())
    assert saved["metadata"] == line["metadata"] == {"completed": "9", "tp": "2"}
    assert (saved["completed"], saved["label"], saved["options"]) == (3, "mine", told)
    assert (saved["commit"], saved["versions"], saved["request_rate"]) == (
        line["commit"],
        line["versions"],
        "inf",
    )


def test_a_named_workload_tells_its_own_numbers(server: FakeServer) -> None:
    _, output = _bench(server, "--workload", "demo-8x64+32")
    told = _line(output)["options"]
    assert (told["workload"], told["num_prompts"], told["seed"]) == ("demo-8x64+32", 8, 6)
    assert not {"random_input_len", "dataset_name"} & set(told)


def test_an_earlier_result_is_the_rival(server: FakeServer, tmp_path: Path) -> None:
    _bench(server, "--save-result", "--result-dir", str(tmp_path), "--result-filename", "r.json")
    status, output = _bench(server, "--num-prompts", "2", "--rival", str(tmp_path / "r.json"))
    rival = _line(output)["rival"]
    assert status == 0
    assert rival["figure"]["completed"] == 3
    assert rival["ratio"]["completed"] == pytest.approx(2 / 3, abs=1e-4)
    assert rival["differs"]["completed"] == [2, 3]
    assert f"ours / {tmp_path / 'r.json'}: output_throughput" in output.replace("\n", "")


def test_a_result_that_cannot_be_saved_is_still_printed(server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "r.json").mkdir()  # a folder where the file should be
    status, output = _bench(
        server, "--save-result", "--result-dir", str(tmp_path), "--result-filename", "r.json"
    )
    assert status == 1
    assert "error: the result cannot be saved to" in output
    assert _line(output)["figure"]["completed"] == 3


def test_answers_without_usage_are_named_and_counted_by_the_tokenizer(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.script = [text("one two three"), text(" four", "length"), DONE]
    _, output = _bench(server)
    figure = _line(output)["figure"]
    assert "3 answers came without `usage`: their tokens are counted by deltas" in output
    assert (figure["requests_without_usage"], figure["counted_instead_by"]) == (3, "deltas")
    assert figure["total_output_tokens"] == 6
    monkeypatch.setattr("cluster.bench.run.token_counter", lambda source: lambda text: len(text.split()))
    figure = _line(_bench(server, "--tokenizer", "words")[1])["figure"]
    assert (figure["total_output_tokens"], figure["counted_instead_by"]) == (12, "tokenizer")
    server.script = [text("a", "length"), usage(5, 1), DONE]
    assert _line(_bench(server)[1])["figure"]["requests_without_usage"] == 0


def test_the_command_waits_for_a_server_that_is_not_ready(server: FakeServer) -> None:
    server.script = [503, "loading"]

    def ready() -> None:
        _wait_for_requests(server, 2)
        server.script = FOUR_TOKENS

    thread = threading.Thread(target=ready)
    thread.start()
    status, output = _bench(server, "--ready-check-timeout-sec", "30")
    thread.join()
    assert status == 0, output


def test_a_trace_with_fewer_requests_is_named(server: FakeServer, tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 3, "output_length": 2}\n')
    status, output = _bench(server, "--dataset-name", "mooncake", "--dataset-path", str(trace))
    assert status == 0
    assert "has only 1 requests that can be used, not 3" in " ".join(output.split())
