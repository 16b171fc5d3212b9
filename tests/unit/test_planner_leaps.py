"""Steps in which nothing is decided are taken together: what comes of a load is the same without that."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import config
from cluster.planner.calibration_file import read_calibrations, write_calibrations
from cluster.planner.demand import Asked
from cluster.planner.plan import Plan, make_plan
from cluster.planner.requests import Simulation
from cluster.planner.run import Outcome
from engine.config import MIB
from tests.bench.swinging_load import TINY_LLAMA, Swing

# Two models on one node, with bursts for one and then for the other: 30 requests of 400 tokens of 8 KiB, of
# which a pool of 16 MiB holds five, and half of the host's 64 MiB ten more.
SWING = Swing(2, 40.0, 5.0, 6.0, 0.1, 300, 100, 64 * MIB, 16 * MIB, 2.5, 0.4, vocab_size=1024)
FIGURES = {
    "source": "made up",
    "device": "cpu",
    "prefill": [{"tokens": 64, "seconds": 0.015}, {"tokens": 256, "seconds": 0.03}],
    "decode": [{"batch": 1, "context": 64, "seconds": 0.03}, {"batch": 16, "context": 64, "seconds": 0.06}],
    "link_bytes_s": 2e8,
    "pin_s_per_gib": 0.0,
    "load_s": 2.0,
}
FILE = """
applications:
  - name: ballonet
    import_path: cluster.app:build
    args:
      llm_configs:
{models}
      controller: {{host_memory_bytes: 64MiB}}
"""
MODEL = """
        - model_loading_config: {{model_id: {name}, model_source: {folder}}}
          engine_kwargs: {{device: cpu, max_num_seqs: 64, max_num_batched_tokens: 512}}
          memory: {{pool_bytes: 16MiB, balloon_bytes: 32MiB, balloon_slab_bytes: 2MiB}}
          slo: {{ttft_ms: 2500, tpot_ms: 400}}
"""


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    models = "".join(MODEL.format(name=name, folder=tmp_path) for name in "ab")
    (tmp_path / "serve.yaml").write_text(FILE.format(models=models))
    write_calibrations(tmp_path / "figures.json", {"a": FIGURES, "b": FIGURES})
    return make_plan(
        config.load(tmp_path / "serve.yaml"),
        groups=None,
        gpu=None,
        calibrations=read_calibrations(tmp_path / "figures.json"),
        load_s=None,
        gpus_per_node=8,
        host_bytes=None,
        seed=0,
    )


def _simulate(plan: Plan, is_balanced: bool, leaps: bool) -> tuple[Simulation, Outcome]:
    loads = [
        [Asked(one.arrival_s, group, one) for one in SWING.workload(group, is_balanced).requests]
        for group in range(2)
    ]
    simulation = Simulation(plan, 1.0, leaps)
    asked = iter(sorted(itertools.chain(*loads), key=lambda one: one[:2]))
    return simulation, simulation.run(asked, lambda now: None, SWING.periods * SWING.period_s)


def _attainment(outcome: Outcome) -> float:
    tallies = outcome.tallies.values()
    return sum(one.both_kept for one in tallies) / sum(one.ended for one in tallies)


@pytest.mark.parametrize("is_balanced", [False, True], ids=["swinging", "balanced"])
def test_leaps_change_nothing_that_counts(plan: Plan, is_balanced: bool) -> None:
    kept: dict[tuple[bool, bool], float] = {}
    for has_controller in (True, False):
        outcomes = {}
        for leaps in (True, False):
            one = plan if has_controller else replace(plan, policy=None)
            simulation, outcomes[leaps] = _simulate(one, is_balanced, leaps)
            kept[has_controller, leaps] = _attainment(outcomes[leaps])
            if leaps:
                assert simulation.num_turns < simulation.num_steps * (0.5 if is_balanced else 0.9)
            else:
                assert simulation.num_turns == simulation.num_steps
        assert kept[has_controller, True] == pytest.approx(kept[has_controller, False], abs=0.03)
        for model_id, leapt in outcomes[True].tallies.items():
            stepped = outcomes[False].tallies[model_id]
            assert (leapt.asked, leapt.ended) == (stepped.asked, stepped.ended)
            assert (leapt.output_tokens, leapt.prompt_tokens) == (
                stepped.output_tokens,
                stepped.prompt_tokens,
            )
            for percent in (50, 90):
                for name in ("ttft_s", "tpot_s"):
                    ours, theirs = (getattr(tally, name).percentile(percent) for tally in (leapt, stepped))
                    assert ours == pytest.approx(theirs, rel=0.1, abs=0.02)
    for leaps in (True, False):
        if is_balanced:
            assert kept[True, leaps] == kept[False, leaps] == 1.0
        else:
            assert kept[True, leaps] > kept[False, leaps] + 0.1
