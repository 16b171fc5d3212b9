"""What a plan's runs say: tables for the terminal, `summary.json` and `curves.csv`."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import orjson
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.bench import report
from cluster.planner.figures import COLUMNS
from cluster.planner.plan import Plan
from cluster.planner.run import Outcome

GIB = 1 << 30


def summary(plan: Plan, outcomes: Mapping[str, Outcome], facts: Mapping[str, Any]) -> dict[str, Any]:
    """All figures, under names of their own.

    Args:
        outcomes: by the name of the run: `controller`, `static`.
        facts: what was simulated, and how.
    """
    return {
        **facts,
        "assumed": list(plan.assumed),
        "not_simulated": list(plan.not_simulated),
        "models": {
            model.model_id: {
                "sources": dict(model.calibration.sources),
                "slo": {"ttft_s": model.ttft_slo_s, "tpot_s": model.tpot_slo_s},
                **{name: _model_figures(model.model_id, one) for name, one in outcomes.items()},
            }
            for model in plan.models
        },
        "all": {name: _all_figures(one) for name, one in outcomes.items()},
        "commit": report.commit(),
    }


def _model_figures(model_id: str, outcome: Outcome) -> dict[str, Any]:
    peaks = outcome.recorder.peaks[model_id]
    samples = [one for one in outcome.recorder.samples if one.model_id == model_id]
    decided = {
        f"{what} {why}": n for (who, what, why), n in outcome.steering.actions.items() if who == model_id
    }
    return outcome.tallies[model_id].figures(outcome.duration_s) | {
        "peak_device_bytes": peaks.get("device", 0),
        "peak_kv_bytes": peaks.get("kv", 0),
        "peak_host_bytes": peaks.get("host", 0),
        "peak_host_used_bytes": peaks.get("host_used", 0),
        "peak_waiting": peaks.get("waiting", 0),
        "peak_parked": peaks.get("parked", 0),
        "replicas": {
            "least": min((one.replicas for one in samples), default=0),
            "most": peaks.get("replicas", 0),
            "mean": statistics.fmean(one.replicas for one in samples) if samples else 0.0,
        },
        "decisions": dict(sorted(decided.items())),
    }


def _all_figures(outcome: Outcome) -> dict[str, Any]:
    steering, tallies = outcome.steering, outcome.tallies.values()
    ended = sum(one.ended for one in tallies)
    times = sorted(steering.decide_s)
    return {
        "requests": sum(one.asked for one in tallies),
        "gpus": outcome.fleet.nodes.most_gpus,
        "nodes": len(outcome.fleet.nodes),
        "peak_node_host_bytes": outcome.recorder.node_held,
        "peak_node_used_bytes": outcome.recorder.node_used,
        "attainment": sum(one.both_kept for one in tallies) / ended if ended else None,
        "ttft_attainment": sum(one.first_kept for one in tallies) / ended if ended else None,
        "tpot_attainment": sum(one.pace_kept for one in tallies) / ended if ended else None,
        "goodput_rps": sum(one.both_kept for one in tallies) / outcome.duration_s,
        "orders": steering.num_orders,
        "reversals_within_dwell": steering.reversals,
        "decide_ms": {
            "median": round(1e3 * statistics.median(times), 3),
            "p99": round(1e3 * times[int(0.99 * (len(times) - 1))], 3),
            "max": round(1e3 * times[-1], 3),
            "calls": len(times),
        }
        if times
        else None,
    }


def write_files(folder: Path, figures: Mapping[str, Any], outcomes: Mapping[str, Outcome]) -> list[Path]:
    """`summary.json` and `curves.csv`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "summary.json", folder / "curves.csv"]
    paths[0].write_bytes(orjson.dumps(figures, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    with paths[1].open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", *COLUMNS])
        for name, outcome in outcomes.items():
            writer.writerows([name, *map(_cell, astuple(one))] for one in outcome.recorder.samples)
    return paths


def _cell(value: Any) -> Any:
    return "" if value is None else round(value, 4) if isinstance(value, float) else value


_MANY = 12  # models that a terminal shows one by one


def tables(figures: Mapping[str, Any]) -> RenderableType:
    """What the terminal shows, in 80 columns."""
    runs, models = list(figures["all"]), figures["models"]
    rows = list(models.items())[:_MANY]
    shown: list[RenderableType] = [_totals(figures["all"]), _promises(rows, runs), _times(rows, runs)]
    shown += [_memory(rows, runs), _decisions(rows, runs)]
    if len(models) > _MANY:
        shown.append(Text(f"and {len(models) - _MANY} models more, in summary.json"))
    shown += [Text(line) for line in _notes(figures)]
    return Group(*shown)


def _table(title: str, *names: str) -> Table:
    """Text in the first two columns, numbers in the others."""
    table = Table(
        box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", title=title, title_justify="left"
    )
    for at, name in enumerate(names):
        table.add_column(name, justify="left" if at < 2 else "right", no_wrap=True)
    table.columns[0].max_width = _NAME
    return table


_NAME = 17  # columns of a model's id


def _totals(runs: Mapping[str, Any]) -> Table:
    table = _table(
        "all models", "run", "requests", "GPUs", "nodes", "host/node", "in use", "both", "goodput/s", "orders"
    )
    table.columns[1].justify = "right"
    for name, one in runs.items():
        table.add_row(
            name,
            f"{one['requests']:,}",
            f"{one['gpus']:,}",
            f"{one['nodes']:,}",
            _gib(one["peak_node_host_bytes"]),
            _gib(one["peak_node_used_bytes"]),
            _percent(one["attainment"]),
            f"{one['goodput_rps']:.2f}",
            f"{one['orders']:,}",
        )
    return table


def _promises(rows: list[tuple[str, Any]], runs: list[str]) -> Table:
    table = _table(
        "\npromises kept", "model", "run", "requests", "refused", "both", "TTFT", "TPOT", "goodput/s"
    )
    for model_id, run, one in _each(rows, runs):
        shares = (_percent(one[f"{what}attainment"]) for what in ("", "ttft_", "tpot_"))
        refused = f"{sum(one['refused'].values()):,}"
        table.add_row(model_id, run, f"{one['requests']:,}", refused, *shares, f"{one['goodput_rps']:.2f}")
    return table


def _times(rows: list[tuple[str, Any]], runs: list[str]) -> Table:
    table = _table("\ntimes", "model", "run", "TTFT p50", "p99", "TPOT p50", "p99", "longest gap")
    for model_id, run, one in _each(rows, runs):
        times = (_time(one[f"{what}_{p}_s"]) for what in ("ttft", "tpot") for p in ("p50", "p99"))
        table.add_row(model_id, run, *times, _time(one["longest_gap_s"]))
    return table


def _memory(rows: list[tuple[str, Any]], runs: list[str]) -> Table:
    table = _table(
        "\nmost at one time", "model", "run", "GPU KV", "balloons", "in use", "waiting", "parked", "copies"
    )
    for model_id, run, one in _each(rows, runs):
        sizes = (_gib(one[f"peak_{what}_bytes"]) for what in ("kv", "host", "host_used"))
        counts = (f"{one[f'peak_{what}']:,}" for what in ("waiting", "parked"))
        table.add_row(model_id, run, *sizes, *counts, f"{one['replicas']['most']:,}")
    return table


def _decisions(rows: list[tuple[str, Any]], runs: list[str]) -> RenderableType:
    lines = [
        f"{model_id or rows[0][0]}: "
        + ", ".join(f"{what} {count}" for what, count in one["decisions"].items())
        for model_id, run, one in _each(rows, runs, repeats=True)
        if one["decisions"]
    ]
    return Group(*map(Text, ["", "decisions of the controller", *lines])) if lines else Text("")


def _each(
    rows: list[tuple[str, Any]], runs: list[str], repeats: bool = False
) -> Iterator[tuple[str, str, Any]]:
    """Every model with every run; its id once, unless `repeats`."""
    for model_id, one in rows:
        for run in runs:
            yield model_id if repeats or run == runs[0] else "", run, one[run]


def _notes(figures: Mapping[str, Any]) -> list[str]:
    lines = ["", *(f"assumed: {one}" for one in figures["assumed"])]
    lines += [f"not simulated: {one}" for one in figures["not_simulated"]]
    told: dict[str, list[str]] = {}
    for model_id, one in figures["models"].items():
        for name, source in one["sources"].items():
            told.setdefault(f"{name}: {source}", []).append(model_id)
    for text, models in told.items():
        whose = f" ({', '.join(models[:3])}{', ...' * (len(models) > 3)})"
        lines.append(f"{text}{whose if len(models) < len(figures['models']) else ''}")
    return lines


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _gib(nbytes: float) -> str:
    if nbytes >= 0.995 * GIB:
        return f"{nbytes / GIB:.1f} GiB"
    return f"{nbytes / (1 << 20):.0f} MiB"
