"""Trace readers, on small files in the formats of the real ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.bench import traces
from cluster.bench.datasets import make_workload
from cluster.bench.options import Options
from cluster.bench.workload import BenchError, PlannedRequest

BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45.0,GPT-4,1087,230,1317,Conversation log
118,GPT-4,417,0,417,API log
120.5,GPT-4,7,60,67,API log
"""
AZURE_2023 = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 00:00:01.509930+00:00,2399,6
"""
MOONCAKE = """{"timestamp": 27482, "input_length": 600, "output_length": 52, "hash_ids": [46, 47]}

{"timestamp": 28535, "input_length": 1100, "output_length": 26, "hash_ids": [46, 48]}
"""
Reader = Callable[[Path, int], list[PlannedRequest]]


def _file(folder: Path, text: str) -> Path:
    path = folder / "trace"
    path.write_text(text)
    return path


def _lengths(requests: list[PlannedRequest]) -> list[tuple[float, int, int]]:
    return [(request.arrival_s, request.prompt_tokens, request.output_tokens) for request in requests]


def test_burstgpt_keeps_answered_calls_of_gpt_4(tmp_path: Path) -> None:
    requests = traces.read_burstgpt(_file(tmp_path, BURSTGPT), 10)
    assert _lengths(requests) == [(45.0, 1087, 230), (120.5, 7, 60)]


@pytest.mark.parametrize(("text", "gap_s"), [(AZURE_2023, 0.052), (AZURE_2024, 1.5)])
def test_azure_of_both_years(tmp_path: Path, text: str, gap_s: float) -> None:
    requests = traces.read_azure(_file(tmp_path, text), 10)
    assert requests[1].arrival_s - requests[0].arrival_s == pytest.approx(gap_s, abs=1e-5)
    assert [request.output_tokens for request in requests] in ([10, 8], [5, 6])


def test_azure_times_are_utc(tmp_path: Path) -> None:
    requests = traces.read_azure(_file(tmp_path, AZURE_2024), 1)
    assert requests[0].arrival_s == pytest.approx(1_715_299_200.00993)


def test_mooncake_shares_the_blocks_that_were_shared(tmp_path: Path) -> None:
    requests = traces.read_mooncake(_file(tmp_path, MOONCAKE), 10)
    assert _lengths(requests) == [(27.482, 600, 52), (28.535, 1100, 26)]
    workload = traces.trace_workload("mooncake", requests, seed=0, vocab_size=32_000)
    first, second = (workload.token_ids(request) for request in workload.requests)
    assert (len(first), len(second)) == (600, 1100)
    assert first[:512] == second[:512]
    assert first[512:600] != second[512:600]
    assert [request.arrival_s for request in workload.requests] == pytest.approx([0.0, 1.053])


def test_an_empty_mooncake_prompt_becomes_one_token(tmp_path: Path) -> None:
    row = '{"timestamp": 1, "input_length": 0, "output_length": 0, "hash_ids": []}'
    requests = traces.read_mooncake(_file(tmp_path, row), 1)
    workload = traces.trace_workload("mooncake", requests, seed=0, vocab_size=32_000)
    assert _lengths(requests) == [(0.001, 1, 1)]
    assert len(workload.token_ids(requests[0])) == 1


@pytest.mark.parametrize(
    ("read", "text"), [(traces.read_azure, AZURE_2024), (traces.read_mooncake, MOONCAKE)]
)
def test_no_more_of_a_trace_is_read_than_wanted(tmp_path: Path, read: Reader, text: str) -> None:
    """A megabyte of lines, then a byte that is no UTF-8: whoever reads the whole file fails."""
    lines = text.rstrip("\n").split("\n")
    path = tmp_path / "trace"
    path.write_bytes(("\n".join(lines) + "\n" + 40_000 * (lines[-1] + "\n")).encode() + b"\xff\n")
    assert len(read(path, 2)) == 2


def test_num_prompts_takes_the_first(tmp_path: Path) -> None:
    broken_later = MOONCAKE + "not json\n"
    assert len(traces.read_mooncake(_file(tmp_path, broken_later), 1)) == 1


def _conversation(*turns: str) -> dict[str, object]:
    return {"id": "x", "conversations": [{"from": "human", "value": turn} for turn in turns]}


def test_sharegpt_gives_questions_and_the_length_of_answers(tmp_path: Path) -> None:
    question, answer = "What is the capital of France?", "It is Paris, as every child there knows."
    conversations = [
        _conversation(question, answer, "more"),
        _conversation("alone, without an answer"),
        _conversation("short", answer),
        _conversation("x" * 5000, answer),
    ]
    path = _file(tmp_path, json.dumps(conversations))
    (request,) = traces.read_sharegpt(path, 10, seed=0)
    assert (request.text, request.prompt_tokens) == (question, len(question) // 4)
    assert request.output_tokens == len(answer) // 4
    (counted,) = traces.read_sharegpt(path, 10, 0, count_tokens=lambda text: len(text.split()))
    assert (counted.prompt_tokens, counted.output_tokens) == (6, 8)
    assert traces.read_sharegpt(path, 10, 0, output_len=7)[0].output_tokens == 7


def test_sharegpt_order_depends_on_the_seed_alone(tmp_path: Path) -> None:
    path = _file(
        tmp_path, json.dumps([_conversation(f"question number {n} of all", "a" * 40) for n in range(30)])
    )
    orders = [[r.text for r in traces.read_sharegpt(path, 30, seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (traces.read_burstgpt, BURSTGPT.replace("230", "many"), "line 3: `Response tokens` must be a number"),
        (traces.read_burstgpt, BURSTGPT + "130,GPT-4\n", "line 6: fewer columns"),
        (traces.read_burstgpt, "Timestamp,Model\n1,GPT-4\n", "line 1: no column Request tokens, Response"),
        (traces.read_burstgpt, BURSTGPT.replace("1087", "-4"), "line 3: .* number of tokens, not '-4'"),
        (
            traces.read_azure,
            AZURE_2023.replace("2023-11-16 18:17:04", "noon"),
            "line 3: `TIMESTAMP` must be a date",
        ),
        (traces.read_azure, "", "line 1: no column"),
        (traces.read_azure, AZURE_2023.splitlines()[0], "has no request"),
        (traces.read_mooncake, MOONCAKE + "{oops\n", "line 4: not JSON"),
        (traces.read_mooncake, "[1]\n", "line 1: not an object but a list"),
        (
            traces.read_mooncake,
            '{"timestamp": 1, "input_length": 3}\n',
            "line 1: `output_length` must be a number",
        ),
        (
            traces.read_mooncake,
            '{"timestamp": 1, "input_length": 9, "output_length": 1, "hash_ids": [1, 2]}\n',
            "line 1: `hash_ids` must be a list of at most one id",
        ),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, read: Reader, text: str, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        read(_file(tmp_path, text), 10)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[\n{]", "line 2: not JSON"),
        ("{}", "line 1: ShareGPT is a list"),
        ('[{"id": 1}]', "conversation 1: no list called"),
        ('[{"conversations": [{"value": "a"}, {"from": "gpt"}]}]', "conversation 1: a turn without"),
        ("[]", "has no request"),
    ],
)
def test_bad_conversations_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        traces.read_sharegpt(_file(tmp_path, text), 10, 0)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"--dataset-path .*nothing cannot be read"):
        traces.read_azure(tmp_path / "nothing", 1)


@pytest.mark.parametrize(
    ("options", "arrivals"),
    [
        ({}, [0.0, 1.053]),
        ({"request_rate": 1.0, "burstiness": float("inf")}, [1.0, 2.0]),
        ({"request_rate": 1.0, "self_timed": True}, [0.0, 1.053]),
        ({"self_timed": False}, [0.0, 0.0]),
    ],
)
def test_a_trace_keeps_its_times_unless_a_rate_is_given(
    tmp_path: Path, options: dict[str, object], arrivals: list[float]
) -> None:
    path = _file(tmp_path, MOONCAKE)
    workload = make_workload(Options("http://x", dataset_name="mooncake", dataset_path=path, **options))  # type: ignore[arg-type]
    assert [request.arrival_s for request in workload.requests] == pytest.approx(arrivals)
