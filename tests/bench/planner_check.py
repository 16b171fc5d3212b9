"""The planner against the engine it plans for: one load, served on this machine's CPU, and simulated.

    python -m tests.bench.planner_check                         # the demo model (`make model`), some minutes
    python -m tests.bench.planner_check --calibration figures.json --rates 0.3 0.6

The engine is measured as `ballonet simulate --calibrate` does it, unless its figures are given. Each load
then goes through the real engine in this process, and through the planner with those figures. Both print the
same: times to the first token and per token as their clients see them, and the share of promises kept. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster import config
from cluster.bench import report
from cluster.bench.summary import percentile
from cluster.bench.workload import Workload
from cluster.planner.calibrating import calibrate
from cluster.planner.calibration_file import read_calibrations
from cluster.planner.demand import Source, merged, read_source
from cluster.planner.plan import ModelPlan, Plan, make_plan
from cluster.planner.requests import Simulation
from tests.bench.in_process import BallonetStepper, drive

_PERCENTS = 50, 90


def served(engine: BallonetStepper, model: ModelPlan, source: Source, seconds: float) -> dict[str, Any]:
    """What became of the load in the real engine."""
    drawn = source.requests(model.model_id, 0)
    requests = itertools.takewhile(lambda one: one.arrival_s < seconds, drawn)
    load = Workload("planned", tuple(requests), 0, engine.engine.info.vocab_size, None)
    records = drive(engine, load).records
    tpot_s = [one.tpot_s or 0.0 for one in records]
    ttft_s = [one.ttft_s for one in records]
    kept = [
        first <= model.ttft_slo_s and pace <= model.tpot_slo_s
        for first, pace in zip(ttft_s, tpot_s, strict=True)
    ]
    times = {"ttft": ttft_s, "tpot": tpot_s}
    return _figures(
        len(records),
        kept,
        {f"{name}_p{p}": percentile(of, p) for name, of in times.items() for p in _PERCENTS},
    )


def simulated(plan: Plan, source: Source, seconds: float) -> dict[str, Any]:
    """What the planner says of it."""
    model = plan.models[0]
    asked = merged({model.model_id: source}, 0, 0.0, seconds)
    tally = Simulation(plan, 1.0).run(asked, lambda now: None, seconds).tallies[model.model_id]
    spreads = {"ttft": tally.ttft_s, "tpot": tally.tpot_s}
    kept = [True] * tally.both_kept + [False] * (tally.ended - tally.both_kept)
    return _figures(
        tally.ended,
        kept,
        {f"{name}_p{p}": of.percentile(p) or 0.0 for name, of in spreads.items() for p in _PERCENTS},
    )


def _figures(count: int, kept: list[bool], times: dict[str, float]) -> dict[str, Any]:
    in_ms = {f"{name}_ms": round(1e3 * seconds, 1) for name, seconds in times.items()}
    return {"requests": count, "attainment": round(sum(kept) / max(1, count), 3)} | in_ms


def main() -> None:
    """Measure, serve, simulate, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", type=Path, default=Path("deploy/laptop.yaml"), help="with one model")
    parser.add_argument("--calibration", type=Path, help="figures of an earlier --calibrate")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.2, 0.4, 0.6], help="requests/s")
    parser.add_argument("--lengths", default="in=120,out=40", help="mean tokens")
    parser.add_argument("--seconds", type=float, default=90.0, help="of each load")
    parser.add_argument("--slo-ms", type=float, nargs=2, default=[2000.0, 250.0], help="TTFT and TPOT")
    args = parser.parse_args()
    file = config.load(args.file)
    path = args.calibration or Path(f"planner_check_{time.time():.0f}.json")
    if args.calibration is None:
        calibrate(file, path, lambda text: print(text, flush=True))
    plan = make_plan(
        file,
        groups=1,
        gpu=None,
        calibrations=read_calibrations(path),
        load_s=None,
        gpus_per_node=1,
        host_bytes=None,
        seed=0,
    )
    if args.calibration is None:
        path.unlink()
    model = plan.models[0]
    slo = replace(model.config.slo, ttft_ms=args.slo_ms[0], tpot_ms=args.slo_ms[1])
    model = replace(model, config=replace(model.config, slo=slo))
    plan = replace(plan, models=(model,), policy=None)
    engine, found = BallonetStepper(model.config), {}
    for rate in args.rates:
        source = read_source(f"poisson:rate={rate},{args.lengths}")
        both = {
            "engine": served(engine, model, source, args.seconds),
            "planner": simulated(plan, source, args.seconds),
        }
        for name, figures in both.items():
            print(f"{rate:g}/s {name:8} {figures}", flush=True)
        found[f"{rate:g}/s"] = both
    print(json.dumps({"bench": "planner_check", "figure": found, "commit": report.commit()}))


if __name__ == "__main__":
    main()
