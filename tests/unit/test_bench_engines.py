"""What benchmarks of engines and kernels print: idle shares, medians, tables, lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cluster.bench.named import named_workload
from kernels import reference
from tests.bench import attention_kernels, engine_side_by_side, gpu_idle, gpu_kernels, processes
from tests.bench.attention_cases import Case, Heads, Problem
from tests.bench.engine_options import EngineOptions
from tests.bench.models import engine_config


def test_overlaps_count_once() -> None:
    spans = [("e", 5, 6), ("a", 0, 2), ("b", 1, 3), ("c", 2.5, 2.75)]
    assert gpu_idle.time_of_each(spans).total() == 4
    assert gpu_idle.time_of_each([]).total() == 0


def test_idle_share_of_a_trace() -> None:
    def event(name: str, ts: int, dur: int, cat: str = "kernel", ph: str = "X") -> dict[str, object]:
        return {"name": name, "ts": ts, "dur": dur, "cat": cat, "ph": ph}

    trace = {
        "traceEvents": [
            event("gemm", 0, 400),
            event("copy", 300, 200, cat="gpu_memcpy"),  # half of it under the product
            event("gemm", 600, 400),
            event("python", 0, 9000, cat="cpu_op"),
            {"ph": "M", "name": "process_name"},
        ]
    }
    idle = gpu_idle.idle_of(gpu_idle.device_events(trace), batch=4, step_ms=0.6, recorded_steps=2)
    assert idle.recorded_idle == pytest.approx(0.1)  # 500 to 600 of 1000
    assert idle.busy_ms_per_step == pytest.approx(0.45)
    assert idle.unrecorded_idle == pytest.approx(0.25)
    assert idle.kernels_per_step == 1.5
    assert idle.kernels_ms == (("gemm", 0.4), ("copy", 0.05))


def test_a_kernel_that_started_early_is_charged_from_the_end_of_the_one_ahead() -> None:
    events = [("join", 1.0, 11.0), ("decode", 0.0, 10.0), ("norm", 12.0, 13.0), ("decode", 20.0, 30.0)]
    assert gpu_idle.time_of_each(events) == {"decode": 20.0, "join": 1.0, "norm": 1.0}
    with pytest.raises(ValueError, match="no kernel"):
        gpu_idle.idle_of([], 4, 1.0, 2)


def _round(rate: float) -> dict[str, float]:
    names = ("ttft", "tpot", "ttst")
    figures = {f"p{p}_{name}_ms": rate + p for name in names for p in (50, 99)}
    shares = {"share_of_floor": 0.25, "share_of_phases": 0.5}
    return figures | shares | {"output_throughput": rate, "max_gap_ms": 9.0, "floor_s": 2.0}


def test_the_median_round_is_reported() -> None:
    assert processes.median_round([_round(3), _round(1), _round(2)])["output_throughput"] == 2
    assert processes.median_round([_round(3), _round(1)])["output_throughput"] == 1


def test_side_by_side_table_and_line() -> None:
    results = {
        "ballonet": {"ready_s": 20.0, "rounds": {"w": [_round(300.0)]}, "gpu": "H100", "commit": "abc"},
        "vllm": {"ready_s": 75.0, "rounds": {"w": [_round(200.0)]}, "versions": {"vllm": "0.26.0"}},
    }
    text = engine_side_by_side.table(results)
    assert "1.500" in text
    assert "start to ready: ballonet 20.0 s, vllm 75.0 s" in text
    line = json.loads(json.dumps(engine_side_by_side.result_json(results)))
    assert line["figure"]["w"]["output_throughput"] == 300.0
    assert line["rival"]["figure"]["w"]["output_throughput"] == 200.0
    assert line["ceiling"]["w"] == {"floor_s": 2.0}
    assert line["share"]["w"] == {"of_floor": 0.25, "of_phases": 0.5}
    assert (line["gpu"], line["versions"]) == ("H100", {"vllm": "0.26.0"})


def test_each_share_stands_under_the_floor_that_it_is_of() -> None:
    head, row, _ = engine_side_by_side.table({"ballonet": {"rounds": {"w": [_round(3.0)]}}}).splitlines()
    for title, share in (("of floor", "25.0%"), ("of phases", "50.0%")):
        end = head.index(title) + len(title)
        assert row[:end].endswith(f" {share}")


def test_a_rival_that_failed_keeps_its_line() -> None:
    results = {"ballonet": {"rounds": {"w": [_round(3.0)]}}, "vllm": {"error": "status 1", "rounds": {}}}
    assert "status 1" in engine_side_by_side.table(results)
    assert engine_side_by_side.result_json(results)["rival"]["error"] == "status 1"


SMALL = Heads(query=4, kv=2, dim=16)
PROBLEMS = [Problem(3, 1, 159, SMALL), Problem(2, 48, 0, SMALL), Problem(2, 16, 144, SMALL)]


@pytest.fixture(params=PROBLEMS, ids=lambda problem: problem.name)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param, torch.device("cpu"), torch.float32)


def _expected(case: Case) -> torch.Tensor:
    """Attention over the plain keys and values, in float64."""
    problem = case.problem
    q = case.q.double().view(problem.batch, problem.queries, SMALL.query, SMALL.dim).transpose(1, 2)
    k, v = (t.double().repeat_interleave(2, dim=2).transpose(1, 2) for t in (case.k, case.v))
    positions = torch.arange(problem.queries)[:, None] + problem.cached
    mask = torch.arange(problem.context)[None] <= positions
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SMALL.scale)
    return out.transpose(1, 2).reshape(case.q.shape)


def test_our_layout_holds_the_keys_and_values(case: Case) -> None:
    assert gpu_kernels.relative_error(attention_kernels.ours(case)(), _expected(case)) < 1e-5


def test_pages_hold_the_keys_and_values(case: Case) -> None:
    k, v, table = case.pages(16)
    for cache, plain in ((k, case.k), (v, case.v)):
        torch.testing.assert_close(cache[table.long()].flatten(1, 2), plain)
    places = case.token_places(case.problem.context, 16)
    torch.testing.assert_close(k.flatten(0, 1)[places], case.k.flatten(0, 1))
    assert not torch.equal(table.flatten(), torch.arange(table.numel(), dtype=torch.int32))


def test_a_context_of_broken_pages_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match="no whole number of pages of 128"):
        case.pages(128)


def test_bytes_and_flop_of_a_problem() -> None:
    decode, prefill = Problem(2, 1, 9, SMALL), Problem(2, 3, 4, SMALL)
    assert decode.kv_bytes == 2 * 10 * 2 * 16 * 2 * 2
    assert prefill.flop == 4 * 2 * 4 * 16 * (5 + 6 + 7)


def _wrong(case: Case) -> attention_kernels.Launch:
    return lambda: torch.ones_like(case.q)


def _missing(case: Case) -> attention_kernels.Launch:
    raise ImportError("no such package")


def test_a_rival_that_cannot_run_says_why_and_one_that_differs_is_not_timed(case: Case) -> None:
    rivals = {"wrong": _wrong, "missing": _missing, "same": attention_kernels.ours}
    launches, timings, _ = gpu_kernels.prepare(case, rivals)
    assert list(launches) == ["ballonet", "same"]
    assert "differs from ours" in timings["wrong"].note
    assert timings["missing"].note == "ImportError: no such package"
    timings["ballonet"].ms, timings["same"].ms = 2.0, 3.0
    text = gpu_kernels.lines(case.problem, timings)
    assert "ours  1.50x" in text[3]
    assert "no such package" in text[2]
    result = gpu_kernels.result_json({case.problem: timings})
    assert result["figure"][case.problem.name]["ms"] == 2.0
    assert result["rival"]["missing"][case.problem.name] == {"error": "ImportError: no such package"}


def test_the_line_counts_bytes_and_flop_and_sets_each_case_beside_them() -> None:
    decode, prefill = Problem(4, 1, 131071), Problem(1, 4096, 0)
    results = {
        problem: {"ballonet": gpu_kernels.Timing(ms), "fa3": gpu_kernels.Timing(2 * ms)}
        for problem, ms in ((decode, 1.0), (prefill, 0.25))
    }
    line = json.loads(json.dumps(gpu_kernels.result_json(results)))
    assert line["ceiling"]["device"]["bytes_per_s"] == 3.35e12
    counted = line["ceiling"]["cases"][decode.name]
    assert counted["read_bytes"] == 4 * 131072 * 8 * 128 * 2 * 2
    assert counted["floor_ms"] == pytest.approx(counted["read_bytes"] / 3.35e9, rel=1e-4)
    counted = line["ceiling"]["cases"][prefill.name]
    assert counted["flop"] == 4 * 32 * 128 * 4096 * 4097 / 2
    assert line["share"][prefill.name] == pytest.approx(counted["flop"] / 798e9 / 0.25, rel=1e-3)
    assert line["rival"]["fa3"][decode.name]["ms"] == 2.0
    assert {"gpu", "versions", "commit"} <= set(line)


def test_the_fastest_decode_measured_is_below_the_ceiling() -> None:
    problem = Problem(4, 1, 131071)
    _, share, unit = gpu_kernels.rate(problem, problem.kv_bytes / 3.07e9)
    assert (round(share, 3), unit) == (0.916, "TB/s")


def test_nan_is_an_error() -> None:
    bad = torch.tensor([1.0, float("nan")])
    assert not gpu_kernels.relative_error(bad, torch.ones(2)) <= 1.0


@pytest.mark.parametrize(
    ("name", "steady"),
    [("growth-256x100+500", True), ("shared-256x4096+128+64", False), ("chats-64x10x1024", False)],
)
def test_idle_is_measured_where_all_decode_at_once_for_long_enough(name: str, steady: bool) -> None:
    assert gpu_idle.can_be_steady(named_workload(name)) == steady


def test_the_models_configuration_is_a_model(tmp_path: Path) -> None:
    config = engine_config("llama-8b", tmp_path, EngineOptions(kv_gib=20.0))
    assert (config.memory.pool_bytes, config.device) == (20 << 30, "cuda")
    assert json.loads((tmp_path / "config.json").read_text())["num_key_value_heads"] == 8


def test_the_longer_model_differs_by_its_length(tmp_path: Path) -> None:
    engine_config("llama-8b", tmp_path)
    short = json.loads((tmp_path / "config.json").read_text())
    engine_config("llama-8b-256k", tmp_path)
    long = json.loads((tmp_path / "config.json").read_text())
    assert long == short | {"max_position_embeddings": 262_144}


def test_ours_runs_through_the_devices_own_kernels() -> None:
    assert attention_kernels.backend.for_device(torch.device("cpu")) is reference
