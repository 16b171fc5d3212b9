"""The memory targets: what is asked of a pool can be taken, in every mode, and what is told of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.bench.workload import RandomPlan
from engine.config import MIB, EngineConfig, MemoryConfig, Mode, ModelSource, SchedulerConfig
from tests.bench import memory_targets, prefill_offload
from tests.bench.in_process import BallonetStepper, wait_for_balloon
from tests.bench.memory_probe import Probe, Step
from tests.bench.models import LLAMA_8B
from tests.bench.prefill_offload import Prefills

SEQS, LONGEST, SIZES = 4, 1024, [256, 1024]


def _engine(folder: Path, mode: Mode, num_layers: int = 2) -> BallonetStepper:
    """Of a tiny model whose largest prefill needs a part of its pool that is worth having."""
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
    }
    sizes |= {"num_key_value_heads": 4, "vocab_size": 3000}
    (folder / "config.json").write_text(json.dumps(LLAMA_8B | sizes))
    source = ModelSource("tiny", str(folder), load_format="dummy", dtype="float32")
    memory = MemoryConfig(pool_bytes=16 * MIB, mode=mode, chunk_bytes=MIB // 8, balloon_bytes=8 * MIB)
    limits = SchedulerConfig(max_num_seqs=SEQS, max_num_batched_tokens=64, max_prefill_tokens=max(SIZES))
    config = EngineConfig(source, memory, limits, max_model_len=LONGEST)
    return BallonetStepper(config)


def _probe(folder: Path, mode: Mode) -> Probe:
    return Probe(_engine(folder, mode), mode, SEQS)


@pytest.fixture(scope="module", params=["static", "virtual", "elastic"])
def probe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Probe:
    return _probe(tmp_path_factory.mktemp("model"), request.param)


def test_what_can_be_had_can_be_taken(probe: Probe) -> None:
    told = probe.available(SIZES, piece=256)
    largest, smallest = told["cells"]["1024"], told["cells"]["256"]
    assert told["filled"]["decode"]["tokens"] == largest["kv_tokens"] > 0
    if told["mode"] == "elastic":
        assert smallest == largest | {"activation_chunks": smallest["activation_chunks"]}
        assert told["filled"]["piece"]["tokens"] == told["beside_piece"]["kv_tokens"] < largest["kv_tokens"]
    else:
        lent = largest["activation_chunks"] - smallest["activation_chunks"]
        assert smallest["kv_chunks"] == largest["kv_chunks"] + lent
        assert lent > 0


def test_a_pool_that_was_filled_is_as_it_was(probe: Probe) -> None:
    step = Step(SEQS, SEQS)
    first, second = probe.fill(step), probe.fill(step)
    assert (first.tokens, first.slots) == (second.tokens, second.slots)


def test_an_idle_engine_gives_back_what_it_does_not_need(tmp_path: Path) -> None:
    load = RandomPlan(3, 100, 5, vocab_size=3000).workload("load")
    idle = _probe(tmp_path, "elastic").idle([load], 256, None)
    assert idle["held_bytes"] < 0.6 * idle["held_before_trim_bytes"]
    assert idle["beyond_weights_bytes"] == idle["held_bytes"] - idle["weight_bytes"] >= 0
    assert idle["taken_back_tokens"] > 0
    assert idle["prefill_after_trim_s"] > 0


def _result(mode: str, tokens: int) -> dict[str, Any]:
    cell = {"kv_chunks": 1024, "kv_tokens": tokens, "activation_chunks": 5}
    return {"mode": mode, "chunk_bytes": 2 * MIB, "cells": {"8192": cell}, "gpu": "H100", "commit": "abc"}


IDLE = {
    **{"held_bytes": 17 << 30, "beyond_weights_bytes": 2 << 30, "held_before_trim_bytes": 70 << 30},
    **{"trim_s": 0.5, "take_back_s": 1.5, "prefill_tokens": 8192},
    **{"prefill_before_trim_s": 0.2, "prefill_after_trim_s": 0.25},
}
RESULTS = {
    "static": _result("static", 131_072),
    "virtual": {"error": "status 1"},
    "elastic": _result("elastic", 262_144) | {"idle": IDLE, "beside_piece": {"kv_chunks": 30_720}},
}


def test_the_table_sets_elastic_over_every_mode() -> None:
    _, static, failed, elastic, *more = memory_targets.table(RESULTS).splitlines()
    assert static.split() == ["8192", "static", "131072", "2.00", "1.00", "2.000"]
    assert failed.endswith("status 1")
    assert elastic.split() == ["8192", "elastic", "262144", "2.00", "2.00", "1.000"]
    assert more[0] == "beside a prefill piece of 8192: 60.00 GiB of KV"
    assert more[1].startswith("idle and trimmed: 17.00 GiB held, 2.00 beyond the weights (70.00 before)")


def test_the_line_has_every_mode_and_the_machine_once() -> None:
    line = json.loads(json.dumps(memory_targets.result_json("llama-8b", RESULTS)))
    assert line["figure"]["static"]["cells"]["8192"]["elastic_over"] == 2.0
    assert line["figure"]["virtual"] == {"error": "status 1"}
    assert line["figure"]["elastic"]["idle"]["take_back_s"] == 1.5
    assert (line["gpu"], line["commit"]) == ("H100", "abc")
    assert "gpu" not in line["figure"]["static"]


def test_prefills_with_and_without_their_kv_leaving(tmp_path: Path) -> None:
    engine = _engine(tmp_path, "elastic", num_layers=4)
    wait_for_balloon(engine, 8 / 1024)
    cell = Prefills(engine).compare(500, runs=2)
    assert cell["runs"] == 2
    assert cell["kept_s"] > 0
    assert 0 < cell["offloaded_s"] <= cell["left_s"]
    assert cell["ratio"] == pytest.approx(cell["offloaded_s"] / cell["kept_s"], rel=1e-3)
    engine.step()
    memory = engine.snapshot.memory
    assert memory.copied_out_bytes == cell["bytes"] * 4  # two steps of warming up, and two that count
    assert memory.balloon == 0
    engine.engine._pool.check()


def test_a_row_of_a_prefill() -> None:
    cell = {"tokens": 8000, "kept_s": 0.2096, "offloaded_s": 0.2066, "ratio": 0.9857, "left_s": 0.21}
    line = prefill_offload.row(cell | {"bytes": 1 << 30})
    assert line.split()[2:6] == ["209.60", "ms", "kept,", "206.60"]
    assert line.endswith("ratio 0.9857; 1024 MiB gone after 210.00 ms")
