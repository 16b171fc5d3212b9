"""One engine, one process: loads it, runs workloads, writes what it measured as JSON.

    python -m tests.bench.run_engine --engine ballonet --model demo --workload demo-8x64+32 --out result.json

`engine_side_by_side` and `ablation_ladder` start it, once for each engine or setting, since each wants the
whole card.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from cluster.bench.floor import CEILINGS, ModelShape, floor_of
from cluster.bench.named import named_workload
from cluster.bench.summary import Summary
from cluster.bench.workload import BenchError, Workload
from engine.errors import BallonetError
from tests.bench import engine_options
from tests.bench.engine_options import EngineOptions
from tests.bench.gpu_idle import can_be_steady, steady_decode_idle
from tests.bench.in_process import (
    BallonetStepper,
    Driven,
    Stepper,
    VllmStepper,
    drive,
    wait_for_balloon,
)
from tests.bench.machine import machine
from tests.bench.models import LLAMAS, MODELS, engine_config, write_llama
from tests.bench.promises import attainment, figures_of, summary_of

ENGINES = ("ballonet", "vllm")
WARM_UP = dict.fromkeys(LLAMAS, "warm-up-32x512+16") | {"demo": "demo-single-64+32"}
_ROUND_SEED = 1000  # each round has prompts of its own, or a prefix cache would answer for the engine


def main() -> None:
    """Measure, and write the file only when all went well.

    Exit status 2 for options that cannot be, 1 for what this machine cannot run; both say why.
    """
    parser = make_parser()
    args = parser.parse_args()
    workloads = checked_workloads(parser, args.workload, args)
    options = engine_options.check(parser, args)
    _check_engine(parser, args)
    if args.idle and not can_be_steady(workloads[0]):
        parser.error(f"--idle: the requests of {workloads[0].name} do not all decode at once for long enough")
    try:
        result = _measure(args, options, workloads)
    except BallonetError as error:
        raise SystemExit(f"{args.engine} cannot run this: {error}") from error
    args.out.write_text(json.dumps(result))


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--model", choices=MODELS, default="llama-8b")
    parser.add_argument("--workload", action="append", required=True)
    add_round_arguments(parser)
    engine_options.add_arguments(parser)
    parser.add_argument("--idle", action="store_true", help="measure the GPU's idle share too (ballonet)")
    parser.add_argument("--started", type=float, default=time.time(), help="when the process was started")
    parser.add_argument("--out", type=Path, required=True)
    return parser


def add_round_arguments(parser: argparse.ArgumentParser) -> None:
    """How often each workload is run, and how much of it."""
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, help="submit no request after so many of a round")


def checked_workloads(
    parser: argparse.ArgumentParser, names: Sequence[str], args: argparse.Namespace
) -> list[Workload]:
    """The workloads of those names; exit status 2 for an unknown one, and where nothing would be run."""
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {args.rounds}")
    if args.seconds is not None and not args.seconds > 0:
        parser.error(f"--seconds must be above 0, not {args.seconds}")
    try:
        return [named_workload(name) for name in names]
    except BenchError as error:
        parser.error(str(error))


def _check_engine(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.engine == "vllm" and args.model not in LLAMAS:
        parser.error("vLLM is measured with --model llama-8b or llama-8b-256k")
    for name in engine_options.OURS:
        if args.engine == "vllm" and getattr(args, name) is not None:
            parser.error(f"{engine_options.flag(name)} is of our engine: leave it out for --engine vllm")
    if args.idle and (args.engine != "ballonet" or args.model == "demo"):
        parser.error("--idle is for --engine ballonet --model llama-8b: it reads the GPU's own records")
    if args.model != "demo" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: nothing to measure here but --engine ballonet --model demo")
    if args.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise SystemExit("vLLM cannot be imported: name the folder that it is in with PYTHONPATH")


def _measure(
    args: argparse.Namespace, options: EngineOptions, workloads: Sequence[Workload]
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        engine = _load(args, options, Path(folder))
        ready_s = time.time() - args.started
        print(f"{args.engine} ready after {ready_s:.1f} s", flush=True)
        started = time.perf_counter()
        drive(engine, named_workload(WARM_UP[args.model]))
        print(f"warmed up in {time.perf_counter() - started:.1f} s", flush=True)
        balloon = _filled_balloon(engine, args, options)
        result: dict[str, Any] = {
            "engine": args.engine,
            "model": args.model,
            "options": options.told(),
            "ready_s": round(ready_s, 2),
            "balloon": balloon,
            "rounds": {workload.name: _rounds(engine, workload, args, options) for workload in workloads},
            **machine(),
        }
        if args.idle and isinstance(engine, BallonetStepper):
            result["idle"] = steady_decode_idle(engine, workloads[0]).as_json()
        return result


def _load(args: argparse.Namespace, options: EngineOptions, folder: Path) -> Stepper:
    if args.engine == "ballonet":
        return BallonetStepper(engine_config(args.model, folder, options))
    return VllmStepper(write_llama(args.model, folder), options)


def _filled_balloon(
    engine: Stepper, args: argparse.Namespace, options: EngineOptions
) -> dict[str, float] | None:
    """The balloon, once all of it is there. One whose size is given, on a GPU, is filled from the start."""
    wanted_gib = options.balloon_gib if args.model in LLAMAS else None
    filled = wait_for_balloon(engine, wanted_gib) if wanted_gib else None
    if filled is None:
        return None
    print(filled, flush=True)
    return {name: round(value, 2) for name, value in asdict(filled).items()}


def _rounds(
    engine: Stepper, workload: Workload, args: argparse.Namespace, options: EngineOptions
) -> list[dict[str, Any]]:
    figures = []
    for number in range(args.rounds):
        again = replace(workload, seed=workload.seed + number * _ROUND_SEED)
        driven = drive(engine, again, submit_for_s=args.seconds or math.inf)
        summary = summary_of(driven, options.objectives_ms)
        figures.append(figures_of(driven, summary) | _share(summary, driven, args.model))
        print(
            f"{workload.name} round {number + 1}: {summary.output_tok_s:.1f} output tok/s, mean TTFT "
            f"{summary.series['ttft'].mean_ms / 1e3:.3f} s, {attainment(figures[-1])} as promised",
            flush=True,
        )
        if summary.failed:
            print(json.dumps(figures[-1]))  # the file is not written, and a long run is worth reading
            raise SystemExit(f"{summary.failed} requests failed; the first: {summary.first_error}")
    return figures


def _share(summary: Summary, driven: Driven, model: str) -> dict[str, Any]:
    """The floor on an H100 of what was run, beside what it took."""
    if model not in LLAMAS:
        return {}
    floor = floor_of(driven.workload, ModelShape.from_config(LLAMAS[model]), CEILINGS["h100"])
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
