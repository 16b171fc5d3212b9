"""The picture of a plan's runs: load, promises, and memory over time, a column for each model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from cluster.planner.figures import Sample
from cluster.planner.plan import Plan
from cluster.planner.run import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST = 4  # models that are drawn
_WIDTH, _ROW = 4.6, 1.9  # inches
_BINS = 40  # of promises and load: with more, chance is all that shows
_RUNS = {"controller": ("C0", "-"), "static": ("C1", "--")}
_GIB = 1 << 30
_DEVICE = (("KV of requests", "kv", "C0"), ("KV cached", "cached", "C9"), ("activations", "activation", "C3"))


def draw(plan: Plan, outcomes: Mapping[str, Outcome], path: Path) -> None:
    """Write a picture; the file's ending says which kind."""
    models = [model.model_id for model in plan.models[:_MOST]]
    rows = 2 + 2 * len(outcomes)
    figure = Figure(figsize=(max(6.0, _WIDTH * len(models)), _ROW * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, len(models), squeeze=False, sharex=True)
    longest_s = max(outcome.duration_s for outcome in outcomes.values())
    unit, unit_s = ("hours", 3600.0) if longest_s > 7200 else ("minutes", 60.0)
    for column, model_id in enumerate(models):
        samples = {
            name: [one for one in outcome.recorder.samples if one.model_id == model_id]
            for name, outcome in outcomes.items()
        }
        _draw_model([axes[column] for axes in grid], samples, unit_s)
        grid[0][column].set_title(model_id, fontsize="medium", fontweight="bold")
        grid[-1][column].set_xlabel(f"time, {unit}")
    for axes in (one for line in grid for one in line):
        axes.set_xlim(0, longest_s / unit_s)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    more = len(plan.models) - len(models)
    title = "ballonet simulate" + (f"; {more} models more are in summary.json" if more else "")
    figure.suptitle(title, fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _draw_model(axes: Sequence[Axes], samples: Mapping[str, Sequence[Sample]], unit_s: float) -> None:
    load, promises, *memories = axes
    first = next(iter(samples.values()))
    load.plot(
        *_binned(first, lambda some: sum(one.load_rps for one in some) / len(some), unit_s), color="0.3"
    )
    load.set_ylabel("load,\nrequests/s")
    for name, some in samples.items():
        colour, dash = _RUNS[name]
        promises.plot(*_binned(some, _kept, unit_s), color=colour, linestyle=dash, marker=".", label=name)
    promises.set_ylabel("both promises\nkept, %")
    promises.set_ylim(top=104)
    promises.legend(fontsize="small", loc="best")
    for number, (name, some) in enumerate(samples.items()):
        _draw_device(memories[number], some, name, unit_s)
        _draw_host(memories[len(samples) + number], some, name, unit_s)
    for alike in (memories[: len(samples)], memories[len(samples) :]):  # the same scale, to compare
        top = max(one.get_ylim()[1] for one in alike)
        for one in alike:
            one.set_ylim(top=top)


def _draw_device(axes: Axes, samples: Sequence[Sample], run: str, unit_s: float) -> None:
    times = [one.time_s / unit_s for one in samples]
    parts = [[getattr(one, name) / _GIB for one in samples] for _, name, _ in _DEVICE]
    axes.stackplot(
        times, parts, labels=[label for label, _, _ in _DEVICE], colors=[c for *_, c in _DEVICE], alpha=0.8
    )
    pools = [(one.kv + one.cached + one.activation + one.free) / _GIB for one in samples]
    axes.plot(times, pools, color="black", linewidth=0.8, label="pools")
    axes.set_ylabel(f"GPU memory, GiB\n({run})")
    axes.set_ylim(top=1.35 * max([*pools, 0.01]))
    axes.legend(fontsize="x-small", loc="upper left", ncols=4, columnspacing=1.0, handlelength=1.2)


def _draw_host(axes: Axes, samples: Sequence[Sample], run: str, unit_s: float) -> None:
    times = [one.time_s / unit_s for one in samples]
    used = [one.balloon_used / _GIB for one in samples]
    cached = [one.balloon_cached / _GIB for one in samples]
    idle = [max(0, one.balloon_physical - one.balloon_used - one.balloon_cached) / _GIB for one in samples]
    limits = [one.balloon_limit / _GIB for one in samples]
    labels, colours = ["KV of requests", "KV cached", "held"], ["C2", "C8", "0.85"]
    axes.stackplot(times, used, cached, idle, labels=labels, colors=colours, alpha=0.8)
    axes.plot(times, limits, color="black", linewidth=0.8, label="allowed")
    axes.set_ylabel(f"balloons, GiB\n({run})")
    axes.set_ylim(top=1.35 * max([*limits, *used, 0.01]))
    axes.legend(fontsize="x-small", loc="upper left", ncols=4, columnspacing=1.0, handlelength=1.2)


def _kept(samples: Sequence[Sample]) -> float:
    """Percent of the requests that ended meanwhile; not a number if none did."""
    ended = sum(one.ended for one in samples)
    kept = sum(one.ended * one.attainment for one in samples if one.attainment is not None)
    return 100 * kept / ended if ended else float("nan")


def _binned(
    samples: Sequence[Sample], value: Callable[[Sequence[Sample]], float], unit_s: float
) -> tuple[list[float], list[float]]:
    """Times and values of stretches of as many samples each."""
    size, rest = max(1, len(samples) // _BINS), iter(samples)
    stretches = list(iter(lambda: list(islice(rest, size)), []))
    return [one[-1].time_s / unit_s for one in stretches], [value(one) for one in stretches]
