"""What one pool is worth in memory: figures of the pool itself, each mode in a process of its own.

    python -m tests.bench.memory_targets                                     # on a GPU
    python -m tests.bench.memory_targets --model demo --sizes 64 256 448 --piece 256

KV tokens that can be had while decoding, by the largest prefill that is allowed in one step: activations
of that size are set aside (static, virtual) or lent (elastic). KV beside a prefill piece. Device memory
that an idle engine holds once trimmed, and what the way back costs. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.bench.engine_options import MODES, EngineOptions
from tests.bench.models import LLAMAS, MODELS
from tests.bench.processes import run_module

_GIB = 2**30
_MACHINE = ("gpu", "versions", "commit")
_LONG_TOKENS = 131_072  # of the prompts that targets are stated for


def main() -> None:
    """Probe every mode, print the table and the JSON line.

    Exit status 1 if one failed or there is no GPU, 2 for options that cannot be.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="llama-8b")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["static", "virtual", "elastic"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[8192, 65_536, 131_072])
    parser.add_argument("--piece", type=int, default=8192, help="tokens of a prefill piece")
    parser.add_argument("--out", type=Path, default=Path("."), help="where logs and results go")
    parser.add_argument("--kv-gib", type=float, help="of the pool")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--max-num-seqs", type=int)
    args = parser.parse_args()
    if min(args.sizes) < 1 or not 0 < args.piece <= max(args.sizes):
        parser.error("--sizes must be above 0, and --piece no more than the largest of them")
    if args.model in LLAMAS and not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing to measure here but --model demo")
    args.out.mkdir(parents=True, exist_ok=True)
    # Asking makes a context, which stays: the probes' own is what is missing afterwards.
    free_before = torch.cuda.mem_get_info()[0] if args.model in LLAMAS else None
    results = {mode: _probe(mode, args, free_before) for mode in args.modes}
    print(table(results))
    print(json.dumps(result_json(args.model, results)))
    sys.exit(1 if any("error" in result for result in results.values()) else 0)


def _probe(mode: str, args: argparse.Namespace, free_before: int | None) -> dict[str, Any]:
    options = EngineOptions(
        mode=mode,  # type: ignore[arg-type] # argparse has checked it
        max_prefill_tokens=max(args.sizes),
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        kv_gib=args.kv_gib,
    )
    words = ["--model", args.model, "--sizes", *map(str, args.sizes), "--piece", str(args.piece)]
    words += [] if free_before is None else ["--free-before", str(free_before)]
    words += options.words()
    return run_module("tests.bench.memory_probe", words, args.out / f"memory-{mode}", f"{mode} mode")


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each largest prefill and mode, then the way back of an idle engine."""
    lines = [
        f"{'largest prefill':>15} {'mode':8} {'KV tokens':>10} {'KV GiB':>7} {'x 128k':>7} "
        f"{'elastic over':>12}"
    ]
    elastic = results.get("elastic", {}).get("cells", {})
    for mode, result in results.items():
        if "error" in result:
            lines.append(f"{'-':>15} {mode:8} {result['error']}")
        for size, cell in result.get("cells", {}).items():
            gib, tokens = cell["kv_chunks"] * result["chunk_bytes"] / _GIB, cell["kv_tokens"]
            over = _over(elastic.get(size), cell)
            lines.append(
                f"{size:>15} {mode:8} {tokens:10} {gib:7.2f} {tokens / _LONG_TOKENS:7.2f} "
                f"{'' if over is None else f'{over:.3f}':>12}"
            )
    return "\n".join([*lines, *_more_lines(results.get("elastic", {}))])


def _over(elastic: Mapping[str, Any] | None, cell: Mapping[str, Any]) -> float | None:
    """Elastic's KV tokens over a cell's."""
    return round(elastic["kv_tokens"] / cell["kv_tokens"], 4) if elastic and cell["kv_tokens"] else None


def _more_lines(result: Mapping[str, Any]) -> list[str]:
    if "idle" not in result:
        return []
    idle, beside = result["idle"], result["beside_piece"]
    gib = {name: value / _GIB for name, value in idle.items() if name.endswith("_bytes")}
    return [
        f"beside a prefill piece of {idle['prefill_tokens']}: "
        f"{beside['kv_chunks'] * result['chunk_bytes'] / _GIB:.2f} GiB of KV",
        f"idle and trimmed: {gib['held_bytes']:.2f} GiB held, {gib['beyond_weights_bytes']:.2f} beyond the "
        f"weights ({gib['held_before_trim_bytes']:.2f} before); trimmed in {idle['trim_s']:.3f} s, all "
        f"taken back in {idle['take_back_s']:.3f} s",
        f"first prefill of {idle['prefill_tokens']}: {idle['prefill_after_trim_s']:.4f} s after a trim, "
        f"{idle['prefill_before_trim_s']:.4f} before",
    ]


def result_json(model: str, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All modes in one object; `elastic_over` is elastic's KV tokens over the mode's."""
    elastic = results.get("elastic", {}).get("cells", {})
    figure: dict[str, Any] = {}
    for mode, result in results.items():
        cells = {
            size: cell | {"elastic_over": _over(elastic.get(size), cell)}
            for size, cell in result.get("cells", {}).items()
        }
        figure[mode] = {name: value for name, value in result.items() if name not in _MACHINE}
        figure[mode] |= {"cells": cells} if cells else {}
    probed = next((result for result in results.values() if "gpu" in result), {})
    return {
        "bench": "memory_targets",
        "model": model,
        "figure": figure,
        "rival": None,
        **{name: probed.get(name) for name in _MACHINE},
    }


if __name__ == "__main__":
    main()
