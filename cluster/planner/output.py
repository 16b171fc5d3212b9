"""What a plan's runs say: tables for the terminal, `summary.json` and `curves.csv`."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping
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
        "nodes": {name: outcome.fleet.num_nodes for name, outcome in outcomes.items()},
        "assumed": list(plan.assumed),
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
        "requests": round(sum(one.asked for one in tallies)),
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
    """What the terminal shows."""
    runs, models = list(figures["all"]), figures["models"]
    shown: list[RenderableType] = [Text(figures["level_told"])]
    rows = list(models.items())[:_MANY]
    shown.append(_promises(rows, runs))
    shown.append(_memory(rows, runs))
    if len(models) > _MANY:
        shown.append(Text(f"and {len(models) - _MANY} models more, in summary.json"))
    shown.append(_totals(figures["all"], figures["nodes"]))
    shown += [Text(line) for line in _notes(figures)]
    return Group(*shown)


def _promises(rows: list[tuple[str, Any]], runs: list[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", title="promises", title_justify="left")
    names = ("model", "run", "requests", "refused", "TTFT ok", "TPOT ok", "both", "goodput/s")
    times = ("TTFT p50 / p99", "TPOT p50 / p99", "longest gap")
    for at, name in enumerate((*names, *times)):
        table.add_column(name, justify="left" if at < 2 else "right")
    for model_id, one in rows:
        for run in runs:
            found = one[run]
            table.add_row(
                model_id if run == runs[0] else "",
                run,
                f"{found['requests']:,}",
                f"{sum(found['refused'].values()):,.0f}",
                *(_percent(found[f"{what}attainment"]) for what in ("ttft_", "tpot_", "")),
                f"{found['goodput_rps']:.2f}",
                *(
                    f"{_time(found[f'{what}_p50_s'])} / {_time(found[f'{what}_p99_s'])}"
                    for what in ("ttft", "tpot")
                ),
                _time(found["longest_gap_s"]),
            )
    return table


def _memory(rows: list[tuple[str, Any]], runs: list[str]) -> Table:
    table = Table(
        box=None,
        pad_edge=False,
        header_style="bold",
        title="\nmemory, groups, decisions",
        title_justify="left",
    )
    for at, name in enumerate(
        ("model", "run", "KV live, peak", "host held, used", "waiting", "parked", "groups", "decisions")
    ):
        table.add_column(name, justify="right" if 1 < at < 7 else "left")
    for model_id, one in rows:
        for run in runs:
            found = one[run]
            groups = found["replicas"]
            table.add_row(
                model_id if run == runs[0] else "",
                run,
                _gib(found["peak_kv_bytes"]),
                f"{_gib(found['peak_host_bytes'])}, {_gib(found['peak_host_used_bytes'])}",
                f"{found['peak_waiting']:,}",
                f"{found['peak_parked']:,}",
                f"{groups['least']}"
                if groups["least"] == groups["most"]
                else f"{groups['least']}-{groups['most']}",
                ", ".join(f"{what} {count}" for what, count in found["decisions"].items()) or "-",
            )
    return table


def _totals(runs: Mapping[str, Any], nodes: Mapping[str, int]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", title="\nall models", title_justify="left")
    for at, name in enumerate(
        ("run", "nodes", "both", "goodput/s", "orders", "reversals", "decide() median / max")
    ):
        table.add_column(name, justify="right" if at else "left")
    for name, one in runs.items():
        times = one["decide_ms"]
        table.add_row(
            name,
            str(nodes[name]),
            _percent(one["attainment"]),
            f"{one['goodput_rps']:.2f}",
            f"{one['orders']:,}",
            f"{one['reversals_within_dwell']:,}",
            f"{times['median']:.1f} / {times['max']:.1f} ms" if times else "-",
        )
    return table


def _notes(figures: Mapping[str, Any]) -> list[str]:
    lines = ["", *(f"assumed: {one}" for one in figures["assumed"])]
    told: dict[str, list[str]] = {}
    for model_id, one in figures["models"].items():
        for name, source in one["sources"].items():
            told.setdefault(f"{name}: {source}", []).append(model_id)
    for text, models in told.items():
        whose = (
            ""
            if len(models) == len(figures["models"])
            else f" ({', '.join(models[:3])}{', ...' * (len(models) > 3)})"
        )
        lines.append(f"figures, {text}{whose}")
    return lines


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _gib(nbytes: float) -> str:
    return f"{nbytes / GIB:.1f} GiB" if nbytes >= GIB / 10 else f"{nbytes / (1 << 20):.0f} MiB"
