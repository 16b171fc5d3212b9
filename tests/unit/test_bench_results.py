"""Result files: their keys, and the comparison with an earlier one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.bench import report, results
from cluster.bench.summary import Record, summarise
from cluster.bench.workload import BenchError

SETTINGS = report.Settings("openai", "org/model", "random", 2.0, 8, {})
RECORDS = [
    Record(0.0, 10, [1.0, 1.5], 1.5, 2, finished=True, counted=True, pieces=["a", "b"]),
    Record(0.5, 11, [1.0], 1.5, error="HTTP 500"),
    Record(1.0, 12),  # interrupted
]
OPTIONS = {"label": None, "tokenizer": None, "num_prompts": 3, "request_rate": 2.0, "burstiness": 1.0}


def _line(**more: Any) -> dict[str, Any]:
    figure = report.figures(summarise(RECORDS, 4.0))
    about = {"model": "org/model", "options": OPTIONS, "metadata": {"completed": "x"}}
    return report.result("serve", "random", figure, None, None, about | more)


def test_names_are_like_vllms(tmp_path: Path) -> None:
    name = results.result_path(tmp_path, None, None, SETTINGS).name
    assert name.startswith("openai-2.0qps-concurrency8-model-")
    assert results.result_path(tmp_path, None, "mine", SETTINGS).name.startswith("mine-2.0qps")
    assert results.result_path(tmp_path, "r.json", "mine", SETTINGS) == tmp_path / "r.json"


def test_keys_are_vllms_and_metadata_replaces_none() -> None:
    content = results.content(_line(), SETTINGS, None)
    assert (content["model_id"], content["endpoint_type"], content["tokenizer_id"]) == (
        "org/model",
        "openai",
        None,
    )
    assert (content["num_prompts"], content["request_rate"], content["burstiness"]) == (3, 2.0, 1.0)
    assert (content["label"], content["max_concurrency"], content["completed"]) == (None, 8, 1)
    assert content["metadata"] == {"completed": "x"}
    assert content["options"] == OPTIONS
    assert {"ceiling", "share", "rival"} < set(content)
    assert "errors" not in content


def test_lists_have_an_entry_for_each_request() -> None:
    content = results.content(_line(), SETTINGS, RECORDS)
    assert content["errors"] == ["", "HTTP 500", "interrupted"]
    assert content["input_lens"] == [10, 11, 12]
    assert content["output_lens"] == [2, 0, 0]
    assert content["ttfts"] == [1.0, 0.5, 0.0]
    assert content["itls"] == [[0.5], [], []]
    assert content["generated_texts"] == ["ab", "", ""]


def test_appended_runs_are_lines_and_the_last_is_the_rival(tmp_path: Path) -> None:
    path = tmp_path / "all.json"
    for throughput in (1.0, 2.0):
        results.save(path, {"output_throughput": throughput}, append=True)
    assert [json.loads(line)["output_throughput"] for line in path.read_text().splitlines()] == [1.0, 2.0]
    assert results.read_rival(path)["output_throughput"] == 2.0
    results.save(path, {"output_throughput": 3.0}, append=False)
    assert len(path.read_text().splitlines()) == 1


@pytest.mark.parametrize("indent", [None, 2])
def test_a_file_of_vllm_is_compared_by_the_names_both_have(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "vllm.json"
    theirs = {
        "backend": "vllm", "model_id": "org/model", "request_rate": 2.0, "completed": 1, "max_concurrency": 8,
        "total_input_tokens": 12, "output_throughput": 0.25, "mean_ttft_ms": 500.0, "rtfx": 0.0,
    }  # fmt: skip
    path.write_text(json.dumps(theirs, indent=indent))
    options = OPTIONS | {"max_concurrency": 8}
    rival = results.compare(_line()["figure"], results.read_rival(path), options)
    assert (rival["backend"], rival["model"]) == ("vllm", "org/model")
    assert rival["figure"] == {
        "completed": 1,
        "total_input_tokens": 12,
        "output_throughput": 0.25,
        "mean_ttft_ms": 500.0,
    }
    assert (rival["ratio"]["output_throughput"], rival["ratio"]["mean_ttft_ms"]) == (2.0, 2.0)
    assert rival["differs"] == {"total_input_tokens": [10, 12]}
    first, second = results.comparison_lines(rival)
    assert "output_throughput 2.00" in first
    assert "total_input_tokens 10 here, 12 there" in second


def test_a_result_line_may_be_the_rival(tmp_path: Path) -> None:
    path = tmp_path / "line.json"
    path.write_text(json.dumps(_line()))
    assert results.read_rival(path)["output_throughput"] == 0.5


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "is not JSON"), ("{", "is not JSON"), ("[1]", "holds no result"), ("{}", "holds no result")],
)
def test_a_rival_that_is_none(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "rival.json"
    path.write_text(content)
    with pytest.raises(BenchError, match=message):
        results.read_rival(path)
