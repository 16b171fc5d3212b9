"""Our engine and vLLM on the same workloads, in one run, one after the other: each wants the whole card.

    python -m tests.bench.engine_side_by_side --vllm-site ~/site            # on a GPU
    python -m tests.bench.engine_side_by_side --model demo --engines ballonet --workload demo-8x64+32

The GPU's idle share in steady decode is measured for ours. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

import torch

from tests.bench import engine_options
from tests.bench.models import LLAMAS, MODELS
from tests.bench.processes import (
    Contender,
    add_process_arguments,
    median_round,
    medians,
    pick,
    run_contender,
)
from tests.bench.promises import PROMISES
from tests.bench.run_engine import ENGINES, add_round_arguments, checked_workloads

DEFAULT_WORKLOADS = {
    "llama-8b": ("8b-256x512+256", "single-512+256"),
    "llama-8b-256k": ("long-4x131072+256",),
    "demo": ("demo-8x64+32",),
}
_CEILING = ("floor_s", "phases_s", "flop", "read_bytes", "device")
_SHARES = ("of_floor", "of_phases")  # of the two floors of cluster/bench/floor.py
_FIGURE = (
    *("output_throughput", "duration", "completed", "failed", "mean_ttft_ms", "p50_ttft_ms", "p99_ttft_ms"),
    *("p50_tpot_ms", "p99_tpot_ms", "p50_ttst_ms", "p99_ttst_ms", "max_gap_ms", "max_itl_ms"),
    *("total_input_tokens", "total_cached_tokens", "steps", "memory"),
    *PROMISES,
)


def main() -> None:
    """Run every engine, print the table and the JSON line.

    Exit status 1 if ours failed or there is no GPU, 2 for options that cannot be.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--model", choices=MODELS, default="llama-8b")
    parser.add_argument("--workload", nargs="+", help="without it those of the model")
    add_round_arguments(parser)
    engine_options.add_arguments(parser)
    add_process_arguments(parser)
    parser.add_argument("--no-idle", action="store_true")
    args = parser.parse_args()
    workloads = checked_workloads(parser, args.workload or DEFAULT_WORKLOADS[args.model], args)
    options = engine_options.check(parser, args)
    if args.model not in LLAMAS and "vllm" in args.engines:
        parser.error("vLLM is measured with --model llama-8b: give --engines ballonet")
    if args.model in LLAMAS and not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing to measure here but --model demo --engines ballonet")
    args.out.mkdir(parents=True, exist_ok=True)
    contenders = {
        "ballonet": Contender("ballonet", "ballonet", options, not args.no_idle and args.model in LLAMAS),
        "vllm": Contender("vllm", "vllm", options.of_any_engine()),
    }
    results = {name: run_contender(contenders[name], workloads, args) for name in args.engines}
    print(table(results))
    for line in idle_lines(results):
        print(line)
    print(json.dumps(result_json(results)))
    sys.exit(1 if "error" in results.get("ballonet", {}) else 0)


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each workload and engine."""
    lines = [
        f"{'workload':30} {'engine':9} {'out tok/s':>9} {'TTFT p50/p99 s':>15} {'TPOT p50/p99 ms':>16} "
        f"{'2nd tok s':>9} {'max gap ms':>10} {'of floor':>8} {'of phases':>9} {'vs vLLM':>7}"
    ]
    rival = results.get("vllm", {}).get("rounds", {})
    for engine, result in results.items():
        if "error" in result:
            lines.append(f"{'-':30} {engine:9} {result['error']}")
        for name, rounds in result.get("rounds", {}).items():
            best = median_round(rounds)
            versus = ""
            if engine != "vllm" and name in rival:
                versus = f"{best['output_throughput'] / median_round(rival[name])['output_throughput']:.3f}"
            shares = [f"{best[f'share_{name}']:.1%}" if f"share_{name}" in best else "" for name in _SHARES]
            lines.append(
                f"{name:30} {engine:9} {best['output_throughput']:9.1f} "
                f"{best['p50_ttft_ms'] / 1e3:7.3f}/{best['p99_ttft_ms'] / 1e3:7.3f} "
                f"{best['p50_tpot_ms']:8.2f}/{best['p99_tpot_ms']:7.2f} {best['p50_ttst_ms'] / 1e3:9.3f} "
                f"{best['max_gap_ms']:10.1f} {shares[0]:>8} {shares[1]:>9} {versus:>7}"
            )
    ready = [f"{engine} {r['ready_s']:.1f} s" for engine, r in results.items() if "ready_s" in r]
    return "\n".join([*lines, f"start to ready: {', '.join(ready) or 'none'}"])


def idle_lines(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the profiler saw of steady decoding."""
    idle = results.get("ballonet", {}).get("idle")
    if idle is None:
        return []
    lines = [
        f"steady decode at batch {idle['batch']}: step {idle['step_ms']:.2f} ms, kernels "
        f"{idle['busy_ms_per_step']:.2f} ms ({idle['kernels_per_step']:.0f} a step), idle "
        f"{idle['unrecorded_idle']:.1%} (recorded span: {idle['recorded_idle']:.1%} of "
        f"{idle['recorded_step_ms']:.2f} ms)"
    ]
    return lines + [f"  {ms:8.3f} ms  {name}" for name, ms in idle["kernels_ms"]]


def result_json(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The run in one object: our figures, their ceiling and share, and the rival's beside them."""
    ours, rival = results.get("ballonet", {}), results.get("vllm", {})

    figure, rival_figure = medians(ours), medians(rival)
    return {
        "bench": "engine_side_by_side",
        "model": ours.get("model") or rival.get("model"),
        "options": ours.get("options"),
        "figure": {name: pick(result, _FIGURE) for name, result in figure.items()},
        "ready_s": ours.get("ready_s"),
        "idle": ours.get("idle"),
        "error": ours.get("error"),
        "ceiling": {name: pick(result, _CEILING) for name, result in figure.items()},
        "share": {
            name: {share: result[f"share_{share}"] for share in _SHARES if f"share_{share}" in result}
            for name, result in figure.items()
        },
        "rival": {"name": "vllm", "figure": {n: pick(f, _FIGURE) for n, f in rival_figure.items()}}
        | pick(rival, ("ready_s", "options", "error"))
        if rival
        else None,
        "gpu": ours.get("gpu") or rival.get("gpu"),
        "versions": {**rival.get("versions", {}), **ours.get("versions", {})},
        "commit": ours.get("commit") or rival.get("commit"),
    }


if __name__ == "__main__":
    main()
