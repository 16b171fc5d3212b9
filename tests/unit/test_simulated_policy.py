"""What the policies make of a load, by the real scheduler and pool in virtual time (`tests/simulation`).

Llama-3.1-8B on an H100 with a few GiB of KV: facts that hold whatever the constants of the policy are.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.bench.workload import RandomPlan, Workload
from tests.bench.ablation_ladder import RUNGS
from tests.bench.engine_options import EngineOptions
from tests.bench.in_process import drive
from tests.bench.promises import figures_of, summary_of
from tests.simulation import report
from tests.simulation.runs import Run, simulate, simulated_engine

# As `tight` of the report, a quarter as large: requests come about twice as fast as memory lets them go.
TIGHT = RandomPlan(60, 4000, 256, request_rate=6.0, seed=1).workload("tight")
# A fifth more than the device can do, for a minute.
OVERLOAD = RandomPlan(480, 2000, 128, request_rate=8.0, seed=1).workload("overload")


def _run(
    rung: str,
    workload: Workload,
    kv_gib: float,
    balloon_gib: float,
    low_priority: frozenset[str] = frozenset(),
) -> Run:
    options: EngineOptions = replace(RUNGS[rung], kv_gib=kv_gib)
    if options.balloon_gib is None:
        options = replace(options, balloon_gib=balloon_gib)
    return simulate(options, workload, priority_of=lambda request_id: 2 * (request_id in low_priority))


@pytest.fixture(scope="module")
def tight() -> dict[str, Run]:
    """The tight load on every rung: 5 GiB for KV and activations, and a balloon for all that does not fit."""
    return {
        rung: _run(rung, TIGHT, 5.0, 40.0) for rung in ("elastic", "balloon", "layer-wise", "slo", "deposit")
    }


def test_the_same_run_twice_is_the_same(tight: dict[str, Run]) -> None:
    again = _run("deposit", TIGHT, 5.0, 40.0)
    assert again.driven.records == tight["deposit"].driven.records
    assert again.figures == tight["deposit"].figures


def test_every_request_is_answered_in_full(tight: dict[str, Run]) -> None:
    for run in tight.values():
        assert run.figures["completed"] == len(TIGHT.requests)
        assert {record.output_tokens for record in run.driven.records} == {256}


@pytest.mark.parametrize("rung", ["slo", "deposit"])
def test_turns_keep_four_times_as_many_promises_and_cost_no_throughput(
    rung: str, tight: dict[str, Run]
) -> None:
    fcfs, turns = tight["elastic"].figures, tight[rung].figures
    assert turns["memory"]["parkings"] > 0
    assert turns["slo_attainment"]["all"] >= 4 * fcfs["slo_attainment"]["all"] > 0
    assert turns["p99_ttft_ms"] < fcfs["p50_ttft_ms"]
    assert turns["output_throughput"] >= 0.98 * fcfs["output_throughput"]


def test_layer_wise_prompts_have_first_tokens_sooner_and_cost_no_throughput(tight: dict[str, Run]) -> None:
    balloon, layer_wise = tight["balloon"].figures, tight["layer-wise"].figures
    assert layer_wise["memory"]["decisions"]["layer_wise"] > 0
    assert layer_wise["p50_ttft_ms"] < 0.5 * balloon["p50_ttft_ms"]
    assert layer_wise["output_throughput"] >= 0.97 * balloon["output_throughput"]


def test_sequences_that_change_places_need_few_driver_calls(tight: dict[str, Run]) -> None:
    """Each would be mapped anew where parts of sequences stay: 5 s of 76 on an H100."""
    memory = tight["slo"].figures["memory"]
    moved = memory["copied_in_gib"] * 2**30 / memory["chunk_bytes"]
    assert memory["driver_calls"] < 0.25 * moved


def test_answers_that_were_cut_short_are_no_forecast() -> None:
    """After a start-up test of few tokens each, everybody seemed to be late: 66 % were in time, not all."""
    options = replace(RUNGS["slo"], kv_gib=5.0, balloon_gib=40.0)
    engine = simulated_engine(options)
    start_up = RandomPlan(32, 512, 16, seed=1).workload("start-up")
    for workload in (start_up, TIGHT):
        driven = drive(engine, workload, engine.clock, engine.clock.advance)
    figures = figures_of(driven, summary_of(driven, options.objectives_ms))
    assert figures["slo_attainment"]["all"] >= 0.95


def test_the_deposit_makes_gaps_shorter_and_changes_no_schedule(tight: dict[str, Run]) -> None:
    slo, deposit = tight["slo"], tight["deposit"]
    assert deposit.num_steps == slo.num_steps
    assert [one.ttft_s for one in deposit.driven.records] == [one.ttft_s for one in slo.driven.records]
    assert [one.end_s for one in deposit.driven.records] == [one.end_s for one in slo.driven.records]
    assert deposit.figures["p50_gap_ms"] < slo.figures["p50_gap_ms"]


@pytest.mark.parametrize(
    ("rate", "is_same"), [(1.0, True), (4.0, False)], ids=["nobody is late", "some would be late"]
)
def test_with_memory_in_plenty_nothing_is_parked(rate: float, is_same: bool) -> None:
    """Nobody has to leave. Prompts that are due soon may take larger steps, which costs nothing in all."""
    workload = RandomPlan(30, 8000, 256, request_rate=rate, seed=1).workload("plenty")
    fcfs, slo = (_run(rung, workload, 61.7, 20.0) for rung in ("elastic", "deposit"))
    assert slo.figures["memory"]["parkings"] == 0
    assert slo.figures["output_throughput"] == pytest.approx(fcfs.figures["output_throughput"], rel=0.01)
    assert slo.figures["slo_attainment"]["all"] >= fcfs.figures["slo_attainment"]["all"]
    if is_same:
        assert slo.driven.records == fcfs.driven.records
        assert slo.num_steps == fcfs.num_steps


@pytest.mark.parametrize("rung", ["elastic", "deposit"])
def test_nobody_starves_behind_others_of_higher_priority(rung: str) -> None:
    low = frozenset(map(str, range(5, 80, 10)))  # of the first ten seconds
    run = _run(rung, OVERLOAD, 2.5, 4.0, low)
    records = run.driven.records
    arrivals_end_s = records[-1].start_s
    assert run.driven.duration_s > arrivals_end_s + 5, "a queue was left when the last request came"
    assert all(record.succeeded for record in records)
    for request_id in low:
        assert records[int(request_id)].end_s < arrivals_end_s, "it had to wait for the end of the overload"


def test_the_report_climbs_the_ladders_rungs_on_each_machine() -> None:
    assert list(report.RUNGS) == ["fcfs", "balloon", "layer-wise", "slo", "deposit"]
    for scenario in report.SCENARIOS.values():
        told = {name: scenario.options(rung) for name, rung in report.RUNGS.items()}
        assert {options.kv_gib for options in told.values()} == {scenario.kv_gib}
        assert told.pop("fcfs").balloon_gib == 0.0
        assert {options.balloon_gib for options in told.values()} == {scenario.balloon_gib}
