"""The curves of times to the first token: their loads, what is said of them, and a small one simulated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.bench.named import named_workload
from tests.bench import ttft_curves
from tests.bench.engine_options import EngineOptions
from tests.bench.ttft_curves import Point

SMALL = (
    *("--contexts", "256", "512", "--context-requests", "4", "--rates", "2", "100", "--rate-context", "2048"),
    *("--rate-requests", "12", "--output-tokens", "64", "--kv-gib", "1.25", "--balloon-gib", "4"),
)


def _points(*words: str) -> list[Point]:
    return ttft_curves.points_of(ttft_curves.make_parser().parse_args(words))


def test_a_point_is_a_load_that_its_name_tells() -> None:
    points = _points("--model", "demo", "--prefill-tok-s", "1000", "--share", "0.5", *SMALL)
    assert [(point.curve, point.x) for point in points] == [
        ("context", 256),
        ("context", 512),
        ("rate", 2.0),
        ("rate", 100.0),
    ]
    loads = [named_workload(point.workload) for point in points]
    assert [len(load.requests) for load in loads] == [4, 4, 12, 12]
    assert [load.requests[0].prompt_tokens for load in loads] == [256, 512, 2048, 2048]
    assert {load.requests[0].output_tokens for load in loads} == {64}
    assert [load.request_rate for load in loads] == pytest.approx([1.953, 0.977, 2.0, 100.0])
    assert {load.vocab_size for load in loads} == {49_152}


def test_longer_prompts_come_less_often() -> None:
    rates = [named_workload(point.workload).request_rate for point in _points("--curve", "context")]
    assert all(
        a is not None and b is not None and a > 1.9 * b for a, b in zip(rates, rates[1:], strict=False)
    )
    # 8,192 tokens: 131 TFLOP of products and attention, at about 600 TFLOP/s.
    assert 0.2 < ttft_curves.prefill_s(8192) < 0.3


def test_ours_is_beside_vllm_or_beside_itself_without_turns() -> None:
    options = EngineOptions(kv_gib=20.0, balloon_gib=48.0)
    ours, vllm = ttft_curves.contenders(options, with_vllm=True)
    assert ours.options == replace(options, policy="slo")
    assert (vllm.engine, vllm.options) == ("vllm", EngineOptions(kv_gib=20.0))
    same, fcfs = ttft_curves.contenders(options, with_vllm=False)
    assert same == ours
    assert (fcfs.engine, fcfs.options.policy, fcfs.options.balloon_gib) == ("ballonet", "fcfs", 0.0)


def _figure(ttft_ms: float, offered: float, completed: float) -> dict[str, Any]:
    times = {
        f"{of}_{name}_ms": ttft_ms for of in ("mean", "p50", "p99", "max") for name in ("ttft", "ttst", "gap")
    }
    tpot = {"p50_tpot_ms": 20.0, "p99_tpot_ms": 30.0, "slo_attainment": {"all": 0.5}}
    rates = {"offered_rps": offered, "completed_rps": completed}
    return times | tpot | rates | {"duration": 9.0, "output_throughput": 100.0, "completed": 40}


POINTS = [Point("rate", rate, f"w{rate}") for rate in (1.0, 2.0, 3.0)]
OURS = [_figure(100 * rate, rate, min(rate, 2.9)) for rate in (1.0, 2.0, 3.0)]
RIVALS = [_figure(110, 1.0, 1.0), _figure(1500, 2.0, 1.8), _figure(900, 3.0, 2.0)]
RESULTS: dict[str, dict[str, Any]] = {
    name: {"rounds": {point.workload: [figure] for point, figure in zip(POINTS, figures, strict=True)}}
    for name, figures in (("ballonet", OURS), ("vllm", RIVALS))
}


def test_a_curve_says_where_an_engine_is_saturated_and_where_the_rival_takes_longest() -> None:
    curve = ttft_curves.curve_json(POINTS, RESULTS)
    assert curve["saturated_from"] == {"ballonet": None, "vllm": 2.0}
    assert curve["largest_ratio"] == {"x": 2.0, "ratio": 7.5, "workload": "w2.0"}
    assert [row["ratio"] for row in curve["points"]] == [1.1, 7.5, 3.0]
    text = ttft_curves.table("rate", curve)
    assert "2.00/1.80*" in text
    assert "3.00/2.90 " in text, "97 % are completed"
    assert "vllm: saturated from 2 req/s" in text
    assert "ballonet: saturated nowhere" in text
    assert text.endswith("largest ratio of mean TTFT: 7.50 at 2 req/s")


def test_a_rival_that_failed_leaves_our_points() -> None:
    curve = ttft_curves.curve_json(POINTS, RESULTS | {"vllm": {"error": "status 1", "rounds": {}}})
    assert (curve["largest_ratio"], curve["points"][0]["ratio"]) == (None, None)
    assert curve["saturated_from"] == {"ballonet": None}
    assert ttft_curves.table("rate", curve).endswith("ballonet: saturated nowhere")


def test_small_curves_simulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["ttft_curves", "--simulate", *SMALL])
    with pytest.raises(SystemExit) as ended:
        ttft_curves.main()
    assert ended.value.code == 0
    *_, last = capsys.readouterr().out.strip().splitlines()
    line = json.loads(last)
    assert (line["bench"], line["simulated"], set(line["curves"])) == (
        "ttft_curves",
        True,
        {"context", "rate"},
    )
    slow, fast = line["curves"]["rate"]["points"]
    assert slow["ratio"] == 1.0, "memory suffices for the few that run at once"
    assert fast["ratio"] > 1.5
    assert "fcfs" in fast["saturated"]
    assert line["curves"]["rate"]["largest_ratio"]["x"] == 100.0
    assert fast["figure"]["ballonet"]["memory"]["parkings"] > 0
    assert line["engines"]["fcfs"]["options"]["balloon_gib"] == 0.0
    assert not list(tmp_path.iterdir()), "what is simulated writes no file"
