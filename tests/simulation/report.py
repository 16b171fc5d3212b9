"""What the policies make of memory that is too small, simulated: an H100, Llama-3.1-8B, no GPU needed.

    python -m tests.simulation.report                              # about a minute on one core
    python -m tests.simulation.report --scenario tight --rungs fcfs slo

    fcfs      one elastic pool, first come, first served
    balloon   and host memory beside it
    slo       and turns on the device, so that first tokens are in time
    deposit   and tokens that are ahead of their clients held back

Times are those of `H100_8B`, the same on every machine; nothing here was measured on a GPU. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.bench import report
from cluster.bench.named import named_workload
from cluster.bench.workload import Workload
from tests.bench.ablation_ladder import RUNGS as LADDER
from tests.bench.engine_options import EngineOptions
from tests.bench.promises import table
from tests.simulation.runs import simulate

RUNGS: Mapping[str, EngineOptions] = {
    "fcfs": LADDER["elastic"],
    **{name: rung for name, rung in LADDER.items() if rung.balloon_gib is None},
}


@dataclass(frozen=True, slots=True)
class Scenario:
    """A load, and a machine too small for it.

    Attributes:
        seconds: of the load's arrivals; None is all of them.
    """

    workload: str
    kv_gib: float
    balloon_gib: float
    max_model_len: int | None = None
    seconds: float | None = None

    def options(self, rung: EngineOptions) -> EngineOptions:
        """A rung on this machine."""
        balloon_gib = self.balloon_gib if rung.balloon_gib is None else rung.balloon_gib
        return replace(rung, kv_gib=self.kv_gib, balloon_gib=balloon_gib, max_model_len=self.max_model_len)


SCENARIOS = {
    "tight": Scenario("capped-120x8000+512-poisson3", 20.0, 100.0),
    "long": Scenario("long-6x126000+128", 57.0, 48.0, max_model_len=131_072),
    "mixed-load": Scenario("mixed-load", 61.7, 60.0, seconds=60.0),
}


def main() -> None:
    """Simulate, print the table and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, default=list(RUNGS))
    parser.add_argument("--ttft-slo-ms", type=float, default=EngineOptions().ttft_slo_ms)
    parser.add_argument("--tpot-slo-ms", type=float, default=EngineOptions().tpot_slo_ms)
    args = parser.parse_args()
    figures: dict[str, dict[str, Any]] = {}
    for name in args.scenario:
        scenario = SCENARIOS[name]
        workload = named_workload(scenario.workload)
        rungs = {rung: options for rung, options in RUNGS.items() if rung in args.rungs}
        figures[name] = {}
        for rung, options in rungs.items():
            promised = replace(options, ttft_slo_ms=args.ttft_slo_ms, tpot_slo_ms=args.tpot_slo_ms)
            figures[name][rung] = _run(scenario, workload, promised)
            first = rung == next(iter(rungs))
            lines = table([(name, rung, figures[name][rung])]).splitlines()
            print("\n".join(lines if first else lines[1:]), flush=True)
    print(
        json.dumps({"bench": "simulation", "simulated": True, "figure": figures, "commit": report.commit()})
    )


def _run(scenario: Scenario, workload: Workload, options: EngineOptions) -> dict[str, Any]:
    started = time.perf_counter()
    run = simulate(scenario.options(options), workload, scenario.seconds or math.inf)
    host = {"host_s": round(time.perf_counter() - started, 1), "engine_steps": run.num_steps}
    return run.figures | host


if __name__ == "__main__":
    main()
