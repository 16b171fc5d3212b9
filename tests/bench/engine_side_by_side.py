"""Our engine and vLLM on the same workloads, in one run, one after the other: each wants the whole card.

    python -m tests.bench.engine_side_by_side --vllm-site ~/site            # on a GPU
    python -m tests.bench.engine_side_by_side --model demo --engines ballonet --workload demo-8x64+32

The GPU's idle share in steady decode is measured for ours. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from cluster.bench.workload import Workload
from tests.bench.models import MODELS
from tests.bench.run_engine import ENGINES, checked_workloads

DEFAULT_WORKLOADS = {"llama-8b": ("8b-256x512+256", "single-512+256"), "demo": ("demo-8x64+32",)}
_LOG_LINES = 40  # of an engine that failed
_CEILING = ("floor_s", "phases_s", "flop", "read_bytes", "device")
_SHARES = ("of_floor", "of_phases")  # of the two floors of cluster/bench/floor.py
_FIGURE = (
    *("output_throughput", "duration", "completed", "failed", "p50_ttft_ms", "p99_ttft_ms"),
    *("p50_tpot_ms", "p99_tpot_ms", "p50_ttst_ms", "p99_ttst_ms", "max_gap_ms", "max_itl_ms"),
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
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vllm-site", type=Path, help="a folder of packages with vLLM in it")
    parser.add_argument("--no-idle", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("."), help="where logs and results go")
    args = parser.parse_args()
    names = args.workload or DEFAULT_WORKLOADS[args.model]
    workloads = checked_workloads(parser, names, args.rounds)
    if args.model == "demo" and "vllm" in args.engines:
        parser.error("vLLM is measured with --model llama-8b: give --engines ballonet")
    if args.model != "demo" and not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing to measure here but --model demo --engines ballonet")
    args.out.mkdir(parents=True, exist_ok=True)
    results = {engine: _run_engine(engine, workloads, args) for engine in args.engines}
    print(table(results))
    for line in idle_lines(results):
        print(line)
    print(json.dumps(result_json(results)))
    sys.exit(1 if "error" in results.get("ballonet", {}) else 0)


def _run_engine(engine: str, workloads: Sequence[Workload], args: argparse.Namespace) -> dict[str, Any]:
    """All workloads of one engine; those that cap the KV cache get a process of their own."""
    merged: dict[str, Any] = {}
    for kv_gib, group in groupby(sorted(workloads, key=lambda w: w.kv_gib or 0.0), key=lambda w: w.kv_gib):
        names = [workload.name for workload in group]
        result = _run_process(engine, names, kv_gib, args)
        rounds = {**merged.get("rounds", {}), **result.get("rounds", {})}
        merged = {**result, **merged, "rounds": rounds}
    return merged


def _run_process(
    engine: str, names: Sequence[str], kv_gib: float | None, args: argparse.Namespace
) -> dict[str, Any]:
    stem = f"{engine}-{'all' if kv_gib is None else f'{kv_gib:g}gib'}"
    out, log = (args.out / f"{stem}.json").resolve(), args.out / f"{stem}.log"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.bench.run_engine", "--engine", engine, "--model", args.model]
    command += [word for name in names for word in ("--workload", name)]
    command += ["--rounds", str(args.rounds), "--out", str(out), "--started", repr(time.time())]
    command += [] if kv_gib is None else ["--kv-gib", str(kv_gib)]
    if engine == "ballonet" and kv_gib is None and not args.no_idle and args.model != "demo":
        command.append("--idle")
    environment = dict(os.environ)
    if engine == "vllm" and args.vllm_site is not None:
        paths = [str(args.vllm_site.resolve()), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    print(f"running {engine}: {', '.join(names)} (log: {log})", flush=True)
    with log.open("w") as sink:
        status = subprocess.run(command, stdout=sink, stderr=subprocess.STDOUT, env=environment).returncode
    if status == 0:
        return dict(json.loads(out.read_text()))
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
    print(f"{engine} failed with status {status}; the end of its log:\n{tail}", flush=True)
    return {"engine": engine, "error": f"status {status}, see {log}"}


def median_round(rounds: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The round with the median output rate; of an even number the slower of the middle two."""
    return sorted(rounds, key=lambda r: float(r["output_throughput"]))[(len(rounds) - 1) // 2]


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


def _medians(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {name: median_round(rounds) for name, rounds in result.get("rounds", {}).items()}


def _pick(source: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: source[name] for name in names if source.get(name) is not None}


def result_json(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The run in one object: our figures, their ceiling and share, and the rival's beside them."""
    ours, rival = results.get("ballonet", {}), results.get("vllm", {})

    figure, rival_figure = _medians(ours), _medians(rival)
    return {
        "bench": "engine_side_by_side",
        "figure": {name: _pick(result, _FIGURE) for name, result in figure.items()},
        "ready_s": ours.get("ready_s"),
        "idle": ours.get("idle"),
        "error": ours.get("error"),
        "ceiling": {name: _pick(result, _CEILING) for name, result in figure.items()},
        "share": {
            name: {share: result[f"share_{share}"] for share in _SHARES if f"share_{share}" in result}
            for name, result in figure.items()
        },
        "rival": {"name": "vllm", "figure": {n: _pick(f, _FIGURE) for n, f in rival_figure.items()}}
        | _pick(rival, ("ready_s", "error"))
        if rival
        else None,
        "gpu": ours.get("gpu") or rival.get("gpu"),
        "versions": {**rival.get("versions", {}), **ours.get("versions", {})},
        "commit": ours.get("commit") or rival.get("commit"),
    }


if __name__ == "__main__":
    main()
