"""One `ballonet simulate`: which level, the runs, and their results."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from tqdm import tqdm

from cluster.config import ServeFile
from cluster.planner import output
from cluster.planner.calibration_file import read_calibrations
from cluster.planner.demand import Source, merged, sources_of
from cluster.planner.picture import draw
from cluster.planner.plan import Plan, make_plan
from cluster.planner.run import Outcome
from engine.step_times import StepWork

Level = Literal["auto", "request", "fluid"]
_AFFORDABLE_S = 900.0  # of processor time, for `auto`
_STEP_S = 0.7e-3  # that a step of the scheduler takes on one core (2.6 GHz)
_LOOKED_AT = 2000  # requests by which a load is estimated
_SAMPLES = 720  # of each curve


@dataclass(frozen=True, slots=True)
class Wishes:
    """The options of the command, as `cluster.planner.command` explains them."""

    path: Path
    traces: tuple[str, ...]
    hours: float | None
    from_hour: float
    groups: int | None
    gpu: str | None
    gpus_per_node: int
    host_bytes: int | None
    calibration: Path | None
    load_s: float | None
    level: Level
    compare: str | None
    out: Path | None
    seed: int


def run(file: ServeFile, wishes: Wishes, progress: Console, console: Console) -> dict[str, Any]:
    """Simulate, print the tables and write the files; the summary."""
    plan = make_plan(
        file,
        groups=wishes.groups,
        gpu=wishes.gpu,
        calibrations={} if wishes.calibration is None else read_calibrations(wishes.calibration),
        load_s=wishes.load_s,
        gpus_per_node=wishes.gpus_per_node,
        host_bytes=wishes.host_bytes,
        seed=wishes.seed,
    )
    sources = sources_of(wishes.traces, [model.model_id for model in plan.models])
    begin_s = wishes.from_hour * 3600
    lasts_s = max(one.lasts_s for one in sources.values()) - begin_s
    if wishes.hours is not None:
        lasts_s = wishes.hours * 3600
    needs_s = _processor_s(plan, sources, begin_s, lasts_s)
    level, told = _level(wishes.level, needs_s)
    progress.print(told, style="dim", markup=False)
    plans = {"controller" if plan.policy else "static": plan}
    if wishes.compare == "static" and plan.policy is not None:
        plans["static"] = replace(plan, policy=None)
    outcomes, took = {}, {}
    for name, one in plans.items():
        started = time.perf_counter()
        outcomes[name] = _simulate(level, one, sources, begin_s, lasts_s, name)
        took[name] = round(time.perf_counter() - started, 1)
    facts = {
        "file": str(wishes.path),
        "traces": list(wishes.traces),
        "level": level,
        "level_told": told,
        "from_s": begin_s,
        "duration_s": {name: round(one.duration_s, 3) for name, one in outcomes.items()},
        "seed": wishes.seed,
        "took_s": took,
        "groups": {model.model_id: model.replicas.first for model in plan.models},
    }
    figures = output.summary(plan, outcomes, facts)
    console.print(output.tables(figures), soft_wrap=True)
    if wishes.out is not None:
        paths = output.write_files(wishes.out, figures, outcomes)
        paths.append(wishes.out / "picture.svg")
        paths[-1].write_text(draw(plan, outcomes, told))
        progress.print(f"wrote {', '.join(map(str, paths))}", style="dim", markup=False)
    return figures


def _simulate(
    level: str, plan: Plan, sources: Mapping[str, Source], begin_s: float, lasts_s: float, name: str
) -> Outcome:
    sample_s = max(plan.tick_s, lasts_s / _SAMPLES)
    asked = merged(sources, plan.seed, begin_s, begin_s + lasts_s)
    with tqdm(total=round(lasts_s), desc=name, unit="s", disable=None) as bar:
        told = _teller(bar, round(lasts_s))
        if level == "fluid":
            from cluster.planner.fluid import FluidLevel

            return FluidLevel(plan, sample_s).run(asked, told, lasts_s)
        from cluster.planner.requests import RequestLevel  # brings Ray, which the router stands on

        return RequestLevel(plan, sample_s).run(asked, told, lasts_s)


def _teller(bar: tqdm[Any], total: int) -> Callable[[float], None]:
    def tell(now: float) -> None:
        bar.update(max(0, min(int(now), total) - int(bar.n)))

    return tell


def _level(wanted: Level, needs_s: float) -> tuple[str, str]:
    """Which level, and why, in words that go into every result."""
    about = f"about {needs_s / 60:.0f} min" if needs_s < 7200 else f"about {needs_s / 3600:.0f} h"
    if wanted == "request":
        return "request", f"level: request (every engine's scheduler; {about} of processor time a run)"
    if wanted == "fluid":
        return "fluid", "level: fluid (crowds of requests; asked for)"
    if needs_s <= _AFFORDABLE_S:
        return "request", f"level: request (every engine's scheduler; {about} of processor time a run)"
    return "fluid", (
        f"level: fluid (crowds of requests), since every engine's scheduler would take {about} of "
        f"processor time a "
        "run; --level request with fewer --hours shows a part of it"
    )


def _processor_s(plan: Plan, sources: Mapping[str, Source], begin_s: float, lasts_s: float) -> float:
    """Processor seconds of the request level, by the first requests of each load."""
    total = 0.0
    for model in plan.models:
        one = sources[model.model_id]
        seen = list(itertools.islice(one.requests(model.model_id, plan.seed), _LOOKED_AT))
        span_s = max(1.0, seen[-1].arrival_s - seen[0].arrival_s)
        rate = len(seen) / span_s
        prompt = sum(r.prompt_tokens for r in seen) / len(seen)
        tokens = sum(r.output_tokens for r in seen) / len(seen)
        steps = model.calibration.steps
        # An engine steps while it has work: that many of its steps fit into a second, at most.
        decode_s = steps.step_s(StepWork(0, 1, int(prompt), 0.0))
        busy = min(1.0, rate / model.replicas.first * tokens * decode_s)
        active_s = lasts_s if len(seen) == _LOOKED_AT else min(lasts_s, span_s)
        total += model.replicas.first * busy / decode_s * active_s
    return total * _STEP_S
