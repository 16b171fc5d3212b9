"""LayerKV's two pictures: time to the first token against context length, and against request rate.

    python -m tests.bench.ttft_curves --curve rate --kv-gib 20 --balloon-gib 48 --vllm-site ~/site  # on a GPU
    python -m tests.bench.ttft_curves --kv-gib 20 --balloon-gib 48 --simulate                       # anywhere

Ours is beside vLLM with as much memory for KV, or, without `--vllm-site`, beside itself with neither turns
nor host memory (`fcfs`). Every engine sees the same prompts at the same times. A rate is saturated (`*`) for
an engine that completes less than 95 % of it. The rates of the context curve are a share of what the device
can prefill at that length. `--simulate` also tells how long each point takes: a curve of two engines has to
fit into the time there is (start, warm-up and balloon come on top). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from cluster.bench.named import named_workload
from cluster.bench.workload import BenchError, Workload
from engine.messages import Piece, StepPlan
from engine.step_times import StepWork
from tests.bench import engine_options
from tests.bench.engine_options import EngineOptions
from tests.bench.machine import machine
from tests.bench.models import LLAMAS, MODELS
from tests.bench.processes import Contender, add_process_arguments, medians, pick, run_contender
from tests.bench.promises import PROMISES, attainment
from tests.bench.run_engine import WARM_UP
from tests.simulation.runs import simulate
from tests.simulation.world import H100_8B

CURVES = ("context", "rate")
_SATURATED = 0.95  # of what is offered
_FIGURE = (
    *("duration", "completed", "output_throughput", "mean_ttft_ms", "p50_ttft_ms", "p99_ttft_ms"),
    *("p50_tpot_ms", "p99_tpot_ms", "memory", *PROMISES),
)


class Point(NamedTuple):
    """One load of a curve.

    Attributes:
        x: tokens of each prompt, or requests a second.
        workload: its name, which says all of it.
    """

    curve: str
    x: float
    workload: str


Results = Mapping[str, Mapping[str, Any]]  # of `run_contender`, by the engine's name


def main() -> None:
    """Run every point on every engine, print the tables and the JSON line.

    Exit status 1 if ours failed or there is no GPU, 2 for options that cannot be.
    """
    args, points, workloads, options = _read_arguments()
    engines = contenders(options, args.vllm_site is not None and not args.simulate)
    if args.simulate:
        results: Results = {one.name: _simulate(one, workloads, args.seconds) for one in engines}
    else:
        args.out.mkdir(parents=True, exist_ok=True)
        results = {one.name: run_contender(one, workloads, args) for one in engines}
    curves = {name: curve_json([p for p in points if p.curve == name], results) for name in args.curve}
    for name, curve in curves.items():
        print(f"\n{table(name, curve)}")
    for name, result in results.items():
        if "error" in result:
            print(f"{name}: {result['error']}")
    print(json.dumps(result_json(curves, results, args)))
    sys.exit(1 if "error" in results["ballonet"] else 0)


def _read_arguments() -> tuple[argparse.Namespace, list[Point], list[Workload], EngineOptions]:
    parser = make_parser()
    args = parser.parse_args()
    options = engine_options.check(parser, args)
    if not args.share > 0 or not all(rate > 0 for rate in args.rates):
        parser.error("--share and --rates must be above 0")
    if args.seconds is not None and not args.seconds > 0:
        parser.error(f"--seconds must be above 0, not {args.seconds}")
    if options.policy is not None or options.balloon_gib == 0:
        parser.error("ours takes turns with a balloon here: leave --policy out, and --balloon-gib above 0")
    if args.simulate and args.model not in LLAMAS:
        parser.error("--simulate is of llama-8b on an H100: leave --model out")
    if args.model not in LLAMAS and args.vllm_site is not None:
        parser.error("vLLM is measured with --model llama-8b: leave --vllm-site out")
    points = points_of(args)
    try:
        workloads = [named_workload(point.workload) for point in points]
    except BenchError as error:
        parser.error(str(error))
    if args.model in LLAMAS and not args.simulate and not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing to measure here but --simulate or --model demo")
    longest = max(
        request.prompt_tokens + request.output_tokens
        for workload in (*workloads, named_workload(WARM_UP[args.model]))
        for request in workload.requests
    )
    caches = bool(options.prefix_caching)
    options = replace(options, prefix_caching=caches, max_model_len=options.max_model_len or longest)
    return args, points, workloads, options


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--curve", nargs="+", choices=CURVES, default=list(CURVES))
    parser.add_argument("--model", choices=MODELS, default="llama-8b")
    parser.add_argument("--output-tokens", type=int, default=512)
    parser.add_argument("--seconds", type=float, help="submit no request after so many of a point")
    parser.add_argument("--simulate", action="store_true", help="in virtual time, without a GPU")
    context = parser.add_argument_group("context")
    context.add_argument("--contexts", type=int, nargs="+", default=[1024 << n for n in range(6)])
    context.add_argument("--share", type=float, default=0.6, help="of what the device can prefill")
    context.add_argument("--prefill-tok-s", type=float, help="that; without it an H100's with an 8B model")
    context.add_argument("--context-requests", type=int, default=20)
    rate = parser.add_argument_group("rate")
    rate.add_argument("--rates", type=float, nargs="+", default=[1.2, 1.6, 2.0, 2.5, 3.0])
    rate.add_argument("--rate-context", type=int, default=8192)
    rate.add_argument("--rate-requests", type=int, default=50)
    engine_options.add_arguments(parser)
    add_process_arguments(parser)
    parser.set_defaults(rounds=1)
    return parser


def points_of(args: argparse.Namespace) -> list[Point]:
    """The points of the curves, one after another."""
    prefix = "" if args.model in LLAMAS else "demo-"
    points = []
    for curve in args.curve:
        if curve == "context":
            loads = [
                (context, args.context_requests, context, args.share / prefill_s(context, args.prefill_tok_s))
                for context in args.contexts
            ]
        else:
            loads = [(rate, args.rate_requests, args.rate_context, rate) for rate in args.rates]
        for x, count, context, rate in loads:
            name = f"{prefix}random-{count}x{context}+{args.output_tokens}-poisson{rate:.3f}"
            points.append(Point(curve, x, name))
    return points


def prefill_s(tokens: int, tok_s: float | None = None) -> float:
    """Seconds to prefill a prompt by itself: at a rate, or as an H100 does it with Llama-3.1-8B."""
    if tok_s is not None:
        return tokens / tok_s
    plan = StepPlan(0, (Piece("", 0, 0, 0, (0,) * tokens, True),), 0)
    return H100_8B.steps.step_s(StepWork.of(plan))


def contenders(options: EngineOptions, with_vllm: bool) -> list[Contender]:
    """Ours, and what it is set beside: vLLM, or itself as a paged engine without turns."""
    ours = Contender("ballonet", "ballonet", replace(options, policy="slo"))
    if with_vllm:
        return [ours, Contender("vllm", "vllm", options.of_any_engine())]
    return [ours, Contender("fcfs", "ballonet", replace(options, policy="fcfs", balloon_gib=0.0))]


def _simulate(contender: Contender, workloads: Sequence[Workload], seconds: float | None) -> dict[str, Any]:
    """What `run_contender` would return, from a fresh engine for each point."""
    rounds = {}
    for workload in workloads:
        run = simulate(contender.options, workload, seconds or math.inf)
        rounds[workload.name] = [run.figures]
    total_s = sum(one[0]["duration"] for one in rounds.values())
    print(f"{contender.name}: {total_s:.0f} s simulated", flush=True)
    return {"model": "llama-8b", "options": contender.options.told(), "rounds": rounds} | machine()


def curve_json(points: Sequence[Point], results: Results) -> dict[str, Any]:
    """One curve: its points, where each engine is saturated, where the rival takes longest beside ours."""
    ran = {name: medians(result) for name, result in results.items()}
    rows: list[dict[str, Any]] = []
    for point in points:
        figures = {
            name: pick(ran[name][point.workload], _FIGURE) for name in ran if point.workload in ran[name]
        }
        row = {"x": point.x, "workload": point.workload, "figure": figures}
        saturated = [name for name, figure in figures.items() if is_saturated(figure)]
        rows.append(row | {"saturated": saturated, "ratio": _ratio(figures)})
    compared = [row for row in rows if row["ratio"] is not None]
    largest = max(compared, key=lambda row: float(row["ratio"]), default=None)
    return {
        "points": rows,
        "saturated_from": {
            name: min((row["x"] for row in rows if name in row["saturated"]), default=None)
            for name in ran
            if any(name in row["figure"] for row in rows)
        },
        "largest_ratio": None if largest is None else pick(largest, ("x", "ratio", "workload")),
    }


def is_saturated(figure: Mapping[str, Any]) -> bool:
    """Whether requests were completed more slowly than they came."""
    return bool(figure.get("completed_rps", math.inf) < _SATURATED * figure.get("offered_rps", 0.0))


def _ratio(figures: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The rival's mean time to the first token over ours."""
    rival = next((figure for name, figure in figures.items() if name != "ballonet"), None)
    if rival is None or "ballonet" not in figures:
        return None
    ours_ms, rivals_ms = (float(figure["mean_ttft_ms"]) for figure in (figures["ballonet"], rival))
    return round(rivals_ms / max(1e-3, ours_ms), 3)


def table(name: str, curve: Mapping[str, Any]) -> str:
    """A line for each point and engine, and what the curve comes to."""
    title = {"context": "tokens in", "rate": "req/s"}[name]
    lines = [
        f"{title:>9} {'engine':9} {'s':>6} {'req/s in/out':>13} {'TTFT mean/p50/p99 s':>22} "
        f"{'TPOT p50/p99 ms':>15} {'in SLO':>6} {'2nd max s':>9} {'gap max s':>9} {'tok/s':>6} {'ratio':>6}"
    ]
    for row in curve["points"]:
        for engine, figure in row["figure"].items():
            lines.append(_row(row, engine, figure))
    for engine, x in curve["saturated_from"].items():
        lines.append(f"{engine}: saturated {f'from {x:g} {title}' if x is not None else 'nowhere'}")
    if largest := curve["largest_ratio"]:
        lines.append(f"largest ratio of mean TTFT: {largest['ratio']:.2f} at {largest['x']:g} {title}")
    return "\n".join(lines)


def _row(row: Mapping[str, Any], engine: str, figure: Mapping[str, Any]) -> str:
    ttft = "/".join(f"{figure[f'{of}_ttft_ms'] / 1e3:.2f}" for of in ("mean", "p50", "p99"))
    rates = "/".join(f"{figure[f'{of}_rps']:.2f}" for of in ("offered", "completed") if f"{of}_rps" in figure)
    mark = "*" if engine in row["saturated"] else " "
    ratio = f"{row['ratio']:.2f}" if engine == "ballonet" and row["ratio"] is not None else ""
    return (
        f"{row['x']:9g} {engine:9} {figure['duration']:6.1f} {rates + mark:>13} {ttft:>22} "
        f"{figure['p50_tpot_ms']:7.1f}/{figure['p99_tpot_ms']:7.1f} {attainment(figure):>6} "
        f"{figure['max_ttst_ms'] / 1e3:9.2f} {figure['max_gap_ms'] / 1e3:9.2f} "
        f"{figure['output_throughput']:6.0f} {ratio:>6}"
    )


def result_json(
    curves: Mapping[str, Mapping[str, Any]], results: Results, args: argparse.Namespace
) -> dict[str, Any]:
    """The run in one object."""
    told = {
        name: pick(result, ("options", "ready_s", "balloon", "error")) for name, result in results.items()
    }
    any_result = next(iter(results.values()), {})
    return {
        "bench": "ttft_curves",
        "model": args.model,
        "simulated": args.simulate,
        "curves": curves,
        "engines": told,
        **{name: any_result.get(name) for name in ("gpu", "versions", "commit")},
    }


if __name__ == "__main__":
    main()
