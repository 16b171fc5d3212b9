"""One engine, one process: loads it, runs workloads, writes what it measured as JSON.

    python -m tests.bench.run_engine --engine ballonet --model demo --workload demo-8x64+32 --out result.json

`engine_side_by_side` starts it, once for each engine, since each wants the whole card.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from cluster.bench import report
from cluster.bench.floor import CEILINGS, ModelShape, floor_of
from cluster.bench.summary import Summary, summarise
from cluster.bench.workload import BenchError, Workload, named_workload
from engine.errors import BallonetError
from tests.bench.gpu_idle import steady_decode_idle
from tests.bench.in_process import BallonetStepper, Stepper, VllmStepper, drive
from tests.bench.machine import machine
from tests.bench.models import LLAMA_8B, MODELS, engine_config, write_llama_8b

ENGINES = ("ballonet", "vllm")
_WARM_UP = {"llama-8b": "warm-up-32x512+16", "demo": "demo-single-64+32"}
_ROUND_SEED = 1000  # each round has prompts of its own, or a prefix cache would answer for the engine
_PERCENTILES = (50.0, 99.0)


def main() -> None:
    """Measure, and write the file only when all went well.

    Exit status 2 for options that cannot be, 1 for what this machine cannot run; both say why.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--model", choices=MODELS, default="llama-8b")
    parser.add_argument("--workload", action="append", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kv-gib", type=float)
    parser.add_argument("--idle", action="store_true", help="measure the GPU's idle share too (ballonet)")
    parser.add_argument("--started", type=float, default=time.time(), help="when the process was started")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    workloads = checked_workloads(parser, args.workload, args.rounds)
    _check_engine(parser, args)
    try:
        result = _measure(args, workloads)
    except BallonetError as error:
        raise SystemExit(f"{args.engine} cannot run this: {error}") from error
    args.out.write_text(json.dumps(result))


def checked_workloads(parser: argparse.ArgumentParser, names: Sequence[str], rounds: int) -> list[Workload]:
    """The workloads of those names; exit status 2 for an unknown one, and where there is no round."""
    if rounds < 1:
        parser.error(f"--rounds must be at least 1, not {rounds}")
    try:
        return [named_workload(name) for name in names]
    except BenchError as error:
        parser.error(str(error))


def _check_engine(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.engine == "vllm" and args.model != "llama-8b":
        parser.error("vLLM is measured with --model llama-8b")
    if args.idle and (args.engine != "ballonet" or args.model == "demo"):
        parser.error("--idle is for --engine ballonet --model llama-8b: it reads the GPU's own records")
    if args.model != "demo" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: nothing to measure here but --engine ballonet --model demo")
    if args.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise SystemExit("vLLM cannot be imported: name the folder that it is in with PYTHONPATH")


def _measure(args: argparse.Namespace, workloads: Sequence[Workload]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        engine = _load(args, Path(folder))
        ready_s = time.time() - args.started
        print(f"{args.engine} ready after {ready_s:.1f} s", flush=True)
        started = time.perf_counter()
        drive(engine, named_workload(_WARM_UP[args.model]))
        print(f"warmed up in {time.perf_counter() - started:.1f} s", flush=True)
        result: dict[str, Any] = {
            "engine": args.engine,
            "ready_s": round(ready_s, 2),
            "rounds": {workload.name: _rounds(engine, workload, args) for workload in workloads},
            **machine(),
        }
        if args.idle and isinstance(engine, BallonetStepper):
            result["idle"] = steady_decode_idle(engine, workloads[0]).as_json()
        return result


def _load(args: argparse.Namespace, folder: Path) -> Stepper:
    if args.engine == "ballonet":
        return BallonetStepper(engine_config(args.model, folder, args.kv_gib))
    return VllmStepper(write_llama_8b(folder), args.kv_gib)


def _rounds(engine: Stepper, workload: Workload, args: argparse.Namespace) -> list[dict[str, Any]]:
    figures = []
    for number in range(args.rounds):
        again = replace(workload, seed=workload.seed + number * _ROUND_SEED)
        summary = summarise(*drive(engine, again), percentiles=_PERCENTILES)
        figures.append(report.figures(summary) | _share(summary, workload, args.model))
        print(f"{workload.name} round {number + 1}: {summary.output_tok_s:.1f} output tok/s", flush=True)
        if summary.failed:
            raise SystemExit(f"{summary.failed} requests failed; the first: {summary.first_error}")
    return figures


def _share(summary: Summary, workload: Workload, model: str) -> dict[str, Any]:
    """The workload's floor on an H100, beside what it took."""
    if model != "llama-8b":
        return {}
    floor = floor_of(workload, ModelShape.from_config(LLAMA_8B), CEILINGS["h100"])
    return {
        "floor_s": round(floor.floor_s, 4),
        "phases_s": round(floor.phases_s, 4),
        "share_of_floor": round(floor.floor_s / summary.duration_s, 4),
        "share_of_phases": round(floor.phases_s / summary.duration_s, 4),
        "flop": floor.flop,
        "read_bytes": floor.read_bytes,
        "device": asdict(floor.ceiling),
    }


if __name__ == "__main__":
    main()
