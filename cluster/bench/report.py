"""What a run says: the block that `vllm bench serve` prints, and one JSON line.

Labels, order and widths of the block are vLLM's (0.26), so that scripts which read it keep working; what
is our own follows after its last section.
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.bench.floor import Floor
from cluster.bench.summary import Series, Summary

_WIDTH = 50
_TITLES = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
    "ttst": ("TTST", "Time to Second Token"),
    "gap": ("Gap", "Longest Gap of a Request"),
}
PERCENTILE_METRICS = ("ttft", "tpot", "itl", "e2el")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the block repeats of the options."""

    backend: str
    model: str
    workload: str
    request_rate: float | None
    max_concurrency: int | None
    objectives_ms: Mapping[str, float]
    percentile_metrics: Sequence[str] = ("ttft", "tpot", "itl")


def block(summary: Summary, settings: Settings) -> str:
    """The block, without a newline at its end."""
    lines = [_rule(" Serving Benchmark Result ", "=")]
    lines += _head(summary, settings)
    for name in PERCENTILE_METRICS:
        if name in settings.percentile_metrics:
            lines += _section(*_TITLES[name], summary.series[name])
    lines += _section(*_TITLES["ttst"], summary.series["ttst"])
    lines += _section(*_TITLES["gap"], summary.series["gap"])
    lines.append(_value("Max Gap (ms):", summary.series["gap"].max_ms))
    if summary.attainment:
        lines.append(_rule("Service Level Objectives", "-"))
        for name, limit in settings.objectives_ms.items():
            lines.append(_value(f"{_TITLES[name][0]} <= {limit:g} ms (%):", 100 * summary.attainment[name]))
        lines.append(_value("SLO attainment (%):", 100 * summary.attainment["all"]))
    return "\n".join([*lines, "=" * _WIDTH])


def _head(summary: Summary, settings: Settings) -> list[str]:
    rate, concurrency = settings.request_rate, settings.max_concurrency
    goodput = summary.request_goodput
    lines = [
        _value("Successful requests:", summary.completed),
        _value("Failed requests:", summary.failed),
        _value("Interrupted requests:", summary.interrupted) if summary.interrupted else "",
        _value("Maximum request concurrency:", concurrency) if concurrency else "",
        _value("Request rate configured (RPS):", rate) if rate and not math.isinf(rate) else "",
        _value("Benchmark duration (s):", summary.duration_s),
        _value("Total input tokens:", summary.input_tokens),
        _value("Total generated tokens:", summary.output_tokens),
        _value("Request throughput (req/s):", summary.request_throughput),
        "" if goodput is None else _value("Request goodput (req/s):", goodput),
        _value("Output token throughput (tok/s):", summary.output_tok_s),
        _value("Peak output token throughput (tok/s):", summary.peak_output_tok_s),
        _value("Peak concurrent requests:", float(summary.peak_concurrency)),
        _value("Total token throughput (tok/s):", summary.total_tok_s),
    ]
    return [line for line in lines if line]


def _section(name: str, title: str, series: Series) -> list[str]:
    percentiles = [
        _value(f"P{percent:g} {name} (ms):", value) for percent, value in series.percentiles_ms.items()
    ]
    return [
        _rule(title, "-"),
        _value(f"Mean {name} (ms):", series.mean_ms),
        _value(f"Median {name} (ms):", series.median_ms),
        *percentiles,
    ]


def _rule(title: str, fill: str) -> str:
    return f"{title:{fill}^{_WIDTH}}"


def _value(label: str, value: float) -> str:
    return f"{label:<40} {value:<10}" if isinstance(value, int) else f"{label:<40} {value:<10.2f}"


def figures(summary: Summary) -> dict[str, float]:
    """The figures under the names that vLLM's result files have, and ours beside them."""
    named: dict[str, Any] = {
        "duration": summary.duration_s,
        "completed": summary.completed,
        "failed": summary.failed,
        "interrupted": summary.interrupted,
        "total_input_tokens": summary.input_tokens,
        "total_output_tokens": summary.output_tokens,
        "total_cached_tokens": summary.cached_tokens,
        "request_throughput": summary.request_throughput,
        "request_goodput": summary.request_goodput,
        "slo_attainment": dict(summary.attainment) or None,
        "output_throughput": summary.output_tok_s,
        "total_token_throughput": summary.total_tok_s,
        "max_output_tokens_per_s": summary.peak_output_tok_s,
        "max_concurrent_requests": summary.peak_concurrency,
    }
    for name, series in summary.series.items():
        named |= {f"mean_{name}_ms": series.mean_ms, f"median_{name}_ms": series.median_ms}
        named |= {f"std_{name}_ms": series.std_ms, f"max_{name}_ms": series.max_ms}
        named |= {f"p{percent:g}_{name}_ms": value for percent, value in series.percentiles_ms.items()}
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in named.items()}


def result(
    bench: str,
    workload: str,
    figure: Mapping[str, Any],
    floor: Floor | None,
    rival: Mapping[str, Any] | None,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """The JSON line that ends every run, before it is encoded.

    `share` is the floor's time over the measured `duration`: 1 would be the ceiling.
    """
    ceiling = share = None
    if floor is not None:
        ceiling = floor.as_json()
        share = {
            "of_floor": round(floor.floor_s / figure["duration"], 4),
            "of_phases": round(floor.phases_s / figure["duration"], 4),
        }
    line = {"bench": bench, "workload": workload, "figure": figure, "ceiling": ceiling, "share": share}
    return {**line, "rival": rival, **about}


def machine(gpu: str | None, packages: Sequence[str]) -> dict[str, Any]:
    """GPU, versions and commit."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"gpu": gpu, "versions": versions, "commit": commit()}


def commit() -> str:
    """Of the checkout that this file belongs to, with `+` if it has changes; `unknown` outside one."""
    root = Path(__file__).resolve().parents[2]
    try:
        if Path(_git(root, "rev-parse", "--show-toplevel")) != root:
            return "unknown"  # an environment inside somebody else's checkout
        head = _git(root, "rev-parse", "--short", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *words: str) -> str:
    run = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True)
    return run.stdout.strip()
