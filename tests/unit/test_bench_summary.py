"""Figures of a run against numbers worked out by hand, and the block they are printed in."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from cluster.bench import floor, report
from cluster.bench.summary import Record, Summary, percentile, read_objectives, summarise
from cluster.bench.workload import BenchError, PlannedRequest, Workload
from tests.bench.models import LLAMA_8B


def _done(start: float, deltas: list[float], tokens: int | None = None, prompt: int = 10) -> Record:
    return Record(start, prompt, deltas, deltas[-1], tokens or len(deltas), finished=True)


# Times in quarters, which floats hold exactly.
RECORDS = [
    _done(0.0, [1.0, 1.25, 1.5, 2.0]),  # TTFT 1000, TPOT 333.3, gaps 250 250 500, E2EL 2000
    _done(0.5, [1.0, 2.0], tokens=5),  # TTFT 500, TPOT 250, gap 1000, E2EL 1500
    _done(1.0, [1.25]),  # TTFT 250, no TPOT, no gap, E2EL 250
    Record(1.0, 10, end_s=1.5, error="HTTP 500"),
    Record(2.0, 10, [3.0]),  # interrupted
]


def _summary(objectives: dict[str, float] | None = None) -> Summary:
    return summarise(RECORDS, 4.0, objectives, (50.0, 99.0))


def test_counts_and_rates() -> None:
    summary = _summary()
    assert (summary.completed, summary.failed, summary.interrupted) == (3, 1, 1)
    assert summary.first_error == "HTTP 500"
    assert (summary.input_tokens, summary.output_tokens) == (30, 10)
    assert summary.request_throughput == 0.75
    assert summary.output_tok_s == 2.5
    assert summary.total_tok_s == 10.0
    assert summary.request_goodput is None


def test_latencies() -> None:
    series = _summary().series
    assert series["ttft"].mean_ms == pytest.approx(1750 / 3)
    assert series["ttft"].median_ms == 500.0
    assert series["tpot"].mean_ms == pytest.approx((1000 / 3 + 250) / 2)
    assert series["itl"].mean_ms == 500.0
    assert series["itl"].max_ms == 1000.0
    assert series["e2el"].median_ms == 1500.0
    assert series["ttst"].mean_ms == pytest.approx((1250 + 1500) / 2)
    assert series["gap"].percentiles_ms[50.0] == 750.0
    assert series["gap"].percentiles_ms[99.0] == pytest.approx(995.0)
    assert series["ttft"].std_ms == pytest.approx(math.sqrt(2 * 250_000 / 9 * 7 / 4), rel=1e-9)


def test_goodput_counts_failures_against_the_server_and_interruptions_not_at_all() -> None:
    summary = _summary({"ttft": 500.0, "tpot": 300.0})
    assert summary.request_goodput == 0.5  # the second and third, in 4 s
    assert summary.attainment == {"ttft": 0.5, "tpot": 0.5, "all": 0.5}
    assert _summary({"e2el": 250.0}).attainment["all"] == 0.25


def test_peaks() -> None:
    summary = _summary()
    # Second 1 has 3 + 2.5 + 1 tokens: the two deltas of the second request carry 2.5 each.
    assert summary.peak_output_tok_s == 6.5
    assert summary.peak_concurrency == 3


def test_nothing_succeeded() -> None:
    summary = summarise([RECORDS[3]], 1.0, {"ttft": 1.0})
    assert (summary.completed, summary.failed, summary.attainment["all"]) == (0, 1, 0.0)
    assert summary.series["ttft"].percentiles_ms == {99.0: 0.0}
    assert summarise([], 0.0).output_tok_s == 0.0


@pytest.mark.parametrize(("percent", "expected"), [(0, 1.0), (50, 2.5), (99, 3.97), (100, 4.0), (25, 1.75)])
def test_percentiles_interpolate(percent: float, expected: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], percent) == pytest.approx(expected)


def test_objectives_are_read() -> None:
    assert read_objectives(["ttft:200", "tpot:50.5"]) == {"ttft": 200.0, "tpot": 50.5}


@pytest.mark.parametrize("text", ["ttft", "ttft:", "itl:5", "ttft:-1", "ttft:nan", "ttft:inf", "ttft:1:2"])
def test_bad_objectives(text: str) -> None:
    with pytest.raises(BenchError, match="NAME:MILLISECONDS"):
        read_objectives([text])


def _settings(**changes: object) -> report.Settings:
    fields: dict[str, object] = {
        "backend": "openai",
        "model": "org/model",
        "workload": "random",
        "request_rate": math.inf,
        "max_concurrency": None,
        "objectives_ms": {},
    }
    return report.Settings(**(fields | changes))  # type: ignore[arg-type]


def test_the_block_is_vllms() -> None:
    """Labels, order, widths and decimals of vLLM 0.26's `vllm bench serve`, then our own sections."""
    objectives = {"ttft": 500.0, "tpot": 300.0}
    settings = _settings(request_rate=2.0, max_concurrency=8, objectives_ms=objectives)
    lines = report.block(_summary(objectives), settings).splitlines()
    assert lines[:20] == [
        "============ Serving Benchmark Result ============",
        "Successful requests:                     3         ",
        "Failed requests:                         1         ",
        "Interrupted requests:                    1         ",
        "Maximum request concurrency:             8         ",
        "Request rate configured (RPS):           2.00      ",
        "Benchmark duration (s):                  4.00      ",
        "Total input tokens:                      30        ",
        "Total generated tokens:                  10        ",
        "Request throughput (req/s):              0.75      ",
        "Request goodput (req/s):                 0.50      ",
        "Output token throughput (tok/s):         2.50      ",
        "Peak output token throughput (tok/s):    6.50      ",
        "Peak concurrent requests:                3.00      ",
        "Total token throughput (tok/s):          10.00     ",
        "---------------Time to First Token----------------",
        "Mean TTFT (ms):                          583.33    ",
        "Median TTFT (ms):                        500.00    ",
        "P50 TTFT (ms):                           500.00    ",
        "P99 TTFT (ms):                           990.00    ",
    ]
    assert lines[20] == "-----Time per Output Token (excl. 1st token)------"
    assert lines[25] == "---------------Inter-token Latency----------------"
    assert lines[30] == "---------------Time to Second Token---------------"
    assert lines[-5:] == [
        "-------------Service Level Objectives-------------",
        "TTFT <= 500 ms (%):                      50.00     ",
        "TPOT <= 300 ms (%):                      50.00     ",
        "SLO attainment (%):                      50.00     ",
        "=" * 50,
    ]


def test_the_block_leaves_out_what_was_not_asked_for() -> None:
    text = report.block(summarise(RECORDS[:3], 4.0), _settings(percentile_metrics=("e2el",)))
    assert "End-to-end Latency" in text
    for absent in ("Time to First", "goodput", "Interrupted", "configured", "Maximum", "Objectives"):
        assert absent not in text


TINY = floor.ModelShape(hidden=4, intermediate=8, layers=2, heads=2, kv_heads=1, head_dim=2, vocab=10)
CEILING = floor.Ceiling("test", bytes_per_s=1000.0, flop_per_s=10_000.0)


def test_the_shape_counts_weights_and_kv() -> None:
    # Each layer: q and o 4x4 each, k and v 4x2 each, three products of 4x8.
    assert TINY.layer_weights == 2 * (2 * 16 + 2 * 8 + 3 * 32)
    assert TINY.head_weights == 40
    assert TINY.weight_bytes == 2 * (288 + 40)
    assert TINY.kv_bytes_per_token == 2 * 2 * 1 * 2 * 2


def test_the_floor_of_one_request_is_its_own_path() -> None:
    workload = Workload("w", (PlannedRequest(0.5, 3, 3),), seed=0)
    bound = floor.floor_of(workload, TINY, CEILING)
    prefill_flop = 2 * (3 * 288 + 40) + 4 * 2 * 2 * 2 * 6
    decode_flop = 2 * 2 * (288 + 40) + 4 * 2 * 2 * 2 * (4 + 5)
    assert bound.flop == prefill_flop + decode_flop
    assert bound.read_bytes == 3 * 656 + (4 + 5) * 16
    prefill_s, decode_s = 656 / 1000, (2 * 656 + 9 * 16) / 1000  # reading the weights takes longest
    assert bound.floor_s == pytest.approx(0.5 + prefill_s + decode_s)
    assert bound.phases_s >= bound.floor_s


def test_the_floor_of_a_batch_reads_the_weights_once_a_step() -> None:
    one = PlannedRequest(0.0, 3, 3)
    alone = floor.floor_of(Workload("w", (one,), 0), TINY, CEILING)
    batch = floor.floor_of(Workload("w", (one,) * 50, 0), TINY, CEILING)
    assert batch.flop == pytest.approx(50 * alone.flop)
    assert batch.read_bytes == alone.read_bytes + 49 * 9 * 16
    assert batch.floor_s == pytest.approx(batch.flop / 10_000)
    assert batch.phases_s >= batch.floor_s


def test_llama_8b_is_counted_right(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    shape = floor.read_shape(tmp_path)
    embedding = shape.hidden * shape.vocab
    norms = shape.hidden * (2 * shape.layers + 1)
    assert shape.layer_weights + shape.head_weights + embedding + norms == 8_030_261_248
    assert shape.kv_bytes_per_token == 131_072


@pytest.mark.parametrize(
    ("text", "message"), [("{}", "has no 'num_att"), ("[]", "not a JSON"), ("{", "be read")]
)
def test_a_configuration_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BenchError, match=message):
        floor.read_shape(tmp_path / "config.json")


def test_the_line_sets_the_run_beside_its_floor() -> None:
    bound = floor.floor_of(Workload("w", (PlannedRequest(0.0, 3, 3),), 0), TINY, CEILING)
    figures = report.figures(_summary())
    line = report.result("serve", "w", figures, bound, None, report.machine("none", ["aiohttp"]))
    assert line["share"]["of_floor"] == round(bound.floor_s / 4.0, 4)
    assert line["ceiling"]["flop"] == bound.flop
    assert set(line) == {
        "bench",
        "workload",
        "figure",
        "ceiling",
        "share",
        "rival",
        "gpu",
        "versions",
        "commit",
    }
    assert "python" in line["versions"]
