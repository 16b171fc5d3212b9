"""What a run says of its promises: how soon first and second tokens came, how evenly the rest, and how many
requests got all they were promised.

One set of figures and one table, for engines in process and for simulated ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cluster.bench import report
from cluster.bench.summary import Record, Summary, summarise
from tests.bench.in_process import Driven

_PERCENTILES = (50.0, 99.0)
PROMISES = (
    *("request_goodput", "slo_attainment", "p50_ttst_ms", "max_ttst_ms", "p50_gap_ms", "max_gap_ms"),
    *("offered_rps", "completed_rps"),
)


def summary_of(driven: Driven, objectives_ms: Mapping[str, float]) -> Summary:
    """The figures of a run, judged by the promises."""
    return summarise(driven.records, driven.duration_s, objectives_ms, _PERCENTILES)


def figures_of(driven: Driven, summary: Summary) -> dict[str, Any]:
    """All figures of a run under their names in a result."""
    return report.figures(summary) | rates(driven.records) | driven.steps


def rates(records: Sequence[Record]) -> dict[str, float]:
    """Requests a second that were offered and completed, where requests are alike and come one by one.

    An engine that keeps up ends as long after the last request came as a request takes at least. What it
    takes longer counts as time to complete them in.
    """
    sizes = {(record.prompt_tokens, record.output_tokens) for record in records}
    starts = [record.start_s for record in records]
    if len(sizes) != 1 or not all(record.succeeded for record in records) or min(starts) == max(starts):
        return {}
    span_s = max(starts) - min(starts)
    busy_s = max(record.end_s for record in records) - min(starts)
    least_s = min(record.e2el_s for record in records)
    offered, completed = ((len(records) - 1) / seconds for seconds in (span_s, busy_s - least_s))
    return {"offered_rps": round(offered, 4), "completed_rps": round(completed, 4)}


def table(rows: Iterable[tuple[str, str, Mapping[str, Any]]]) -> str:
    """A line for each (workload, engine or setting, figures of a run)."""
    head = (
        f"{'workload':28} {'engine':9} {'s':>6} {'tok/s':>6} {'TTFT p50/p99 s':>14} {'TPOT p50/p99 ms':>15} "
        f"{'in SLO':>6} {'2nd token p50/max s':>19} {'gap p50/max s':>13} {'parked':>6} {'GiB out/in':>11}"
    )
    return "\n".join([head, *(_row(*row) for row in rows)])


def _row(workload: str, engine: str, figure: Mapping[str, Any]) -> str:
    memory = figure.get("memory", {})
    moved = f"{memory['copied_out_gib']:.1f}/{memory['copied_in_gib']:.1f}" if memory else ""
    return (
        f"{workload:28} {engine:9} {figure['duration']:6.1f} {figure['output_throughput']:6.0f} "
        f"{_pair(figure, 'ttft', 'p50', 'p99'):>14} "
        f"{figure['p50_tpot_ms']:7.1f}/{figure['p99_tpot_ms']:7.1f} {attainment(figure):>6} "
        f"{_pair(figure, 'ttst', 'p50', 'max'):>19} {_pair(figure, 'gap', 'p50', 'max'):>13} "
        f"{memory.get('parkings', ''):>6} {moved:>11}"
    )


def attainment(figure: Mapping[str, Any]) -> str:
    """The share of requests that got all they were promised."""
    return f"{figure['slo_attainment']['all']:.0%}" if figure.get("slo_attainment") else ""


def _pair(figure: Mapping[str, Any], name: str, first: str, second: str) -> str:
    return f"{figure[f'{first}_{name}_ms'] / 1e3:.2f}/{figure[f'{second}_{name}_ms'] / 1e3:.2f}"
