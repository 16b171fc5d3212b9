"""One `ballonet simulate`: the runs, and their results."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from tqdm import tqdm

from cluster.bench.workload import OptionError
from cluster.config import ServeFile
from cluster.planner import output
from cluster.planner.calibration_file import read_calibrations
from cluster.planner.demand import Source, merged, sources_of
from cluster.planner.plan import Plan, make_plan
from cluster.planner.run import Outcome

_REQUEST_S, _GROUP_S = 4e-3, 1e-3  # of processor time: a request, and a second of a group (2.6 GHz)
_LONG_S = 1800.0
_LOOKED_AT = 2000  # requests by which a load is estimated
_SAMPLES = 720  # of each curve


@dataclass(frozen=True, slots=True)
class Wishes:
    """The options of the command, as `cluster.planner.command` explains them."""

    path: Path
    traces: tuple[str, ...]
    hours: float | None = None
    from_hour: float = 0.0
    groups: int | None = None
    gpu: str | None = None
    gpus_per_node: int = 8
    host_bytes: int | None = None
    calibration: Path | None = None
    load_s: float | None = None
    compare: str | None = None
    out: Path | None = None
    picture: Path | None = None
    seed: int = 0


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
    lasts_s = _lasts_s(sources, begin_s, wishes)
    _tell_how_long(progress, _processor_s(plan, sources, lasts_s))
    plans = {"controller" if plan.policy else "static": plan}
    if wishes.compare == "static" and plan.policy is not None:
        plans["static"] = replace(plan, policy=None)
    outcomes, took = {}, {}
    for name, one in plans.items():
        started = time.perf_counter()
        outcomes[name] = _simulate(one, sources, begin_s, lasts_s, name)
        took[name] = round(time.perf_counter() - started, 1)
    facts = {
        "file": str(wishes.path),
        "traces": list(wishes.traces),
        "from_s": begin_s,
        "duration_s": {name: round(one.duration_s, 3) for name, one in outcomes.items()},
        "seed": wishes.seed,
        "took_s": took,
        "groups": {model.model_id: model.replicas.first for model in plan.models},
    }
    figures = output.summary(plan, outcomes, facts)
    console.print(output.tables(figures))
    paths = [] if wishes.out is None else output.write_files(wishes.out, figures, outcomes)
    if wishes.picture is not None:
        from cluster.planner.picture import draw

        draw(plan, outcomes, wishes.picture)
        paths.append(wishes.picture)
    if paths:
        progress.print(f"wrote {', '.join(map(str, paths))}", style="dim", markup=False)
    return figures


def _lasts_s(sources: Mapping[str, Source], begin_s: float, wishes: Wishes) -> float:
    """How much of the load is simulated. Raises OptionError if that is nothing."""
    if wishes.hours is not None:
        return wishes.hours * 3600
    ends_s = max(one.lasts_s for one in sources.values())
    if begin_s >= ends_s:
        raise OptionError(f"--from-hour {wishes.from_hour:g}: the load lasts {ends_s / 3600:.2f} hours")
    return ends_s - begin_s


def _simulate(
    plan: Plan, sources: Mapping[str, Source], begin_s: float, lasts_s: float, name: str
) -> Outcome:
    from cluster.planner.requests import Simulation  # brings Ray, which the router stands on

    asked = merged(sources, plan.seed, begin_s, begin_s + lasts_s)
    with tqdm(total=round(lasts_s), desc=name, unit="s", disable=None) as bar:
        told = _teller(bar, round(lasts_s))
        return Simulation(plan, max(plan.tick_s, lasts_s / _SAMPLES)).run(asked, told, lasts_s)


def _tell_how_long(progress: Console, needs_s: float) -> None:
    hint = "; --from-hour and --hours simulate a part of the load" if needs_s > _LONG_S else ""
    if needs_s > 60:
        progress.print(
            f"about {needs_s / 60:.0f} min of processor time a run{hint}", style="dim", markup=False
        )


def _teller(bar: tqdm[Any], total: int) -> Callable[[float], None]:
    def tell(now: float) -> None:
        bar.update(max(0, min(int(now), total) - int(bar.n)))

    return tell


def _processor_s(plan: Plan, sources: Mapping[str, Source], lasts_s: float) -> float:
    """Processor seconds of a run, by the first requests of each load."""
    total = 0.0
    for model in plan.models:
        one = sources[model.model_id]
        seen = list(itertools.islice(one.requests(model.model_id, plan.seed), _LOOKED_AT))
        span_s = max(1.0, seen[-1].arrival_s - seen[0].arrival_s)
        count = len(seen) * (lasts_s / span_s if len(seen) == _LOOKED_AT else 1.0)
        total += count * _REQUEST_S + model.replicas.first * lasts_s * _GROUP_S
    return total
