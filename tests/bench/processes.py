"""Engines in processes of their own, one after the other: each wants the whole card.

Owns the starting, the logs and the choice of the round that is reported; what is printed of it is the
callers'.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from cluster.bench.workload import Workload
from tests.bench.engine_options import EngineOptions
from tests.bench.gpu_idle import can_be_steady

_LOG_LINES = 40  # of an engine that failed


class Contender(NamedTuple):
    """One engine under one name.

    Attributes:
        engine: one of `run_engine.ENGINES`.
        measures_idle: the GPU's idle share too, if the first workload allows it.
    """

    name: str
    engine: str
    options: EngineOptions
    measures_idle: bool = False


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """Where vLLM is, and where the files go."""
    parser.add_argument("--vllm-site", type=Path, help="a folder of packages with vLLM in it")
    parser.add_argument("--out", type=Path, default=Path("."), help="where logs and results go")


def run_contender(
    contender: Contender, workloads: Sequence[Workload], args: argparse.Namespace
) -> dict[str, Any]:
    """All workloads of one contender; those that cap the KV cache get a process of their own.

    Args:
        args: with `model`, `rounds`, `seconds`, `vllm_site` and `out`.

    Returns:
        What `run_engine` wrote; of one that failed `error`, and whatever ran before.
    """

    def cap(workload: Workload) -> float:
        return contender.options.kv_gib or workload.kv_gib or 0.0

    merged: dict[str, Any] = {}
    for kv_gib, group in groupby(sorted(workloads, key=cap), key=cap):
        options = replace(contender.options, kv_gib=kv_gib or None)
        result = _run_process(contender._replace(options=options), list(group), args)
        rounds = {**merged.get("rounds", {}), **result.get("rounds", {})}
        merged = {**result, **merged, "rounds": rounds}
    return merged


def _run_process(
    contender: Contender, workloads: Sequence[Workload], args: argparse.Namespace
) -> dict[str, Any]:
    kv_gib, names = contender.options.kv_gib, [workload.name for workload in workloads]
    stem = f"{contender.name}-{'all' if kv_gib is None else f'{kv_gib:g}gib'}"
    words = [*engine_words(contender, workloads, args), "--started", repr(time.time())]
    environment = dict(os.environ)
    if contender.engine == "vllm" and args.vllm_site is not None:
        paths = [str(args.vllm_site.resolve()), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    title = f"{contender.name}: {', '.join(names)}"
    result = run_module("tests.bench.run_engine", words, args.out / stem, title, environment)
    return {"engine": contender.engine, **result}


def run_module(
    module: str,
    words: Sequence[str],
    stem: Path,
    title: str,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run a benchmark in a process of its own; what it wrote to `--out`, or `error`.

    Args:
        stem: of the result (.json) and the log (.log).
        title: printed, with the end of the log if it fails.
    """
    out, log = stem.with_name(stem.name + ".json").resolve(), stem.with_name(stem.name + ".log")
    out.unlink(missing_ok=True)
    print(f"running {title} (log: {log})", flush=True)
    command = [sys.executable, "-m", module, *words, "--out", str(out)]
    with log.open("w") as sink:
        status = subprocess.run(command, stdout=sink, stderr=subprocess.STDOUT, env=environment).returncode
    if status == 0:
        return dict(json.loads(out.read_text()))
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
    print(f"{title} failed with status {status}; the end of its log:\n{tail}", flush=True)
    return {"error": f"status {status}, see {log}"}


def engine_words(contender: Contender, workloads: Sequence[Workload], args: argparse.Namespace) -> list[str]:
    """The command line of `run_engine` for it, without where the result goes."""
    words = ["--engine", contender.engine, "--model", args.model, "--rounds", str(args.rounds)]
    words += [word for workload in workloads for word in ("--workload", workload.name)]
    words += [] if args.seconds is None else ["--seconds", str(args.seconds)]
    words += contender.options.words()
    if contender.measures_idle and contender.options.kv_gib is None and can_be_steady(workloads[0]):
        words.append("--idle")
    return words


def median_round(rounds: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The round with the median output rate; of an even number the slower of the middle two."""
    return sorted(rounds, key=lambda r: float(r["output_throughput"]))[(len(rounds) - 1) // 2]


def medians(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The median round of each workload."""
    return {name: median_round(rounds) for name, rounds in result.get("rounds", {}).items()}


def pick(source: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Those of the names that have a value."""
    return {name: source[name] for name in names if source.get(name) is not None}
