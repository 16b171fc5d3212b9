"""The ablation ladder: what each rung is told, and what is printed of it."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from cluster.bench.named import named_workload
from tests.bench import ablation_ladder, processes, run_engine
from tests.bench.engine_options import EngineOptions
from tests.bench.processes import Contender

OPTIONS = EngineOptions(max_model_len=768, max_prefill_tokens=65_536)
ARGS = Namespace(model="llama-8b", rounds=2, seconds=30.0, vllm_site=None, out=Path("."))


def test_each_rung_has_one_thing_more() -> None:
    found = ablation_ladder.contenders(list(ablation_ladder.RUNGS), OPTIONS, with_vllm=False)
    names = ("mode", "prefix_caching", "policy", "layer_wise", "deposit")
    told = [(c.name, *(getattr(c.options, name) for name in names)) for c in found]
    assert told == [
        ("static", "static", False, "fcfs", None, None),
        ("virtual", "virtual", False, "fcfs", None, None),
        ("elastic", "elastic", False, "fcfs", None, None),
        ("sharing", "elastic", True, "fcfs", None, None),
        ("balloon", "elastic", False, "fcfs", False, None),
        ("layer-wise", "elastic", False, "fcfs", True, None),
        ("slo", "elastic", False, "slo", True, False),
        ("deposit", "elastic", False, "slo", True, True),
    ]
    assert [c.options.balloon_gib for c in found] == [0.0] * 4 + [None] * 4
    common = {(c.engine, c.options.max_model_len, c.options.max_prefill_tokens) for c in found}
    assert common == {("ballonet", 768, 65_536)}


def test_the_balloon_is_of_the_rungs_that_have_one() -> None:
    options = EngineOptions(balloon_gib=48.0, turn_tokens=32, ttft_slo_ms=500.0)
    found = ablation_ladder.contenders(list(ablation_ladder.RUNGS), options, with_vllm=True)
    assert [c.options.balloon_gib for c in found] == [0.0] * 4 + [48.0] * 4 + [None]
    assert {c.options.ttft_slo_ms for c in found} == {500.0}
    assert found[-1].options.told() == {"ttft_slo_ms": 500.0, "tpot_slo_ms": 150.0}


@pytest.mark.parametrize("caching", [None, False])
def test_vllm_comes_last_with_what_it_is_told(caching: bool | None) -> None:
    options = EngineOptions(prefix_caching=caching, max_model_len=768)
    found = ablation_ladder.contenders(["elastic", "static"], options, with_vllm=True)
    assert [c.name for c in found] == ["static", "elastic", "vllm"]
    assert found[-1] == Contender("vllm", "vllm", options)


@pytest.mark.parametrize("measures_idle", [True, False])
def test_the_engines_process_reads_what_it_is_told(measures_idle: bool) -> None:
    workloads = [named_workload("growth-256x100+500"), named_workload("chats-64x10x1024")]
    contender = Contender("static", "ballonet", EngineOptions("static", False, max_num_seqs=8), measures_idle)
    words = processes.engine_words(contender, workloads, ARGS)
    args = run_engine.make_parser().parse_args([*words, "--out", "x.json"])
    assert (args.engine, args.model, args.rounds, args.seconds) == ("ballonet", "llama-8b", 2, 30.0)
    assert args.workload == ["growth-256x100+500", "chats-64x10x1024"]
    assert args.idle == measures_idle
    assert EngineOptions.of(args) == contender.options


def _round(duration: float, cached: int = 0, **memory: float) -> dict[str, Any]:
    steps = {"max_running": 3, "decode_steps": 9, "decode_step_p99_ms": 5.0, "decode_step_max_ms": 7.5}
    figures = {"duration": duration, "output_throughput": 100 / duration, "mean_ttft_ms": 1500.0}
    tokens = {"total_input_tokens": 200, "total_cached_tokens": cached}
    return figures | tokens | {"p99_tpot_ms": 12.0, "steps": steps} | ({"memory": memory} if memory else {})


RESULTS: dict[str, dict[str, Any]] = {
    "static": {"model": "m", "rounds": {"w": [_round(8.0, max_kv_gib=2.0)]}, "gpu": "H100", "commit": "abc"},
    "sharing": {"rounds": {"w": [_round(5.0), _round(4.0, 50, max_kv_gib=1.5), _round(3.0)]}, "ready_s": 9.0},
    "vllm": {"rounds": {"w": [_round(2.0)]}},
    "virtual": {"error": "status 1", "rounds": {}},
}


def test_the_table_has_a_row_for_each_rung() -> None:
    head, *rows = ablation_ladder.table(RESULTS).splitlines()
    assert [row.split()[1] for row in rows] == ["static", "sharing", "vllm", "virtual"]
    assert [row.split()[3] for row in rows[:3]] == ["1.000", "2.000", "4.000"]
    assert "25.0%" in rows[1]
    assert "5.00/7.50" in rows[0]
    assert rows[3].endswith("status 1")
    end = head.index("cached") + len("cached")
    assert rows[1][:end].endswith("25.0%")


def test_the_line_has_every_rung_and_the_rival_by_itself() -> None:
    line = json.loads(json.dumps(ablation_ladder.result_json(RESULTS)))
    assert line["bench"] == "ablation_ladder"
    assert list(line["rungs"]) == ["static", "sharing", "virtual"]
    assert line["rungs"]["sharing"]["figure"]["w"]["duration"] == 4.0
    assert line["rungs"]["virtual"] == {"error": "status 1", "figure": {}}
    assert line["rival"]["figure"]["w"]["duration"] == 2.0
    assert (line["gpu"], line["commit"], line["model"]) == ("H100", "abc", "m")
