"""What it costs a prompt that its keys and values leave for host memory while it is computed.

    python -m tests.bench.prefill_offload                                    # on a GPU
    python -m tests.bench.prefill_offload --model demo --tokens 64 448 --balloon-gib 0.25

One step of an idle engine computes the whole prompt: from its launch until the logits of its last token are
there, with KV that stays on the device, and layer-wise, each layer leaving as soon as it is computed
(LayerKV, section 3.1). The two take turns. Besides, until the last layer has left. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from engine.errors import BallonetError
from engine.memory.backing import Backing
from engine.memory.blocks import TokenChain
from engine.memory.pool import MemoryPool
from engine.messages import Piece, StepPlan
from tests.bench import engine_options
from tests.bench.in_process import BallonetStepper, wait_for_balloon
from tests.bench.machine import machine
from tests.bench.models import LLAMAS, MODELS, engine_config

_WARM_UP = 2  # the first maps what it needs, and so does the first of a length
_RUNS = 7


def main() -> None:
    """Measure, print a row for each length and the JSON line.

    Exit status 1 for what this machine cannot run, 2 for options that cannot be.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="llama-8b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2000, 8000, 32_768], help="of the prompts")
    engine_options.add_arguments(parser)
    parser.set_defaults(balloon_gib=16.0)
    args = parser.parse_args()
    if args.model in LLAMAS and not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing to measure here but --model demo")
    options = engine_options.check(parser, args)
    if min(args.tokens) < 1 or not options.balloon_gib:
        parser.error("--tokens and --balloon-gib must be above 0")
    longest = max(args.tokens)
    options = replace(options, max_prefill_tokens=longest, max_model_len=options.max_model_len or longest + 1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            stepper = BallonetStepper(engine_config(args.model, Path(folder), options))
        wait_for_balloon(stepper, args.balloon_gib)
        prefills = Prefills(stepper)
        cells = []
        for tokens in args.tokens:
            cells.append(prefills.compare(tokens))
            print(row(cells[-1]), flush=True)
    except BallonetError as error:
        sys.exit(f"{' '.join(options.words())} cannot be run: {error}")
    print(json.dumps({"bench": "prefill_offload", "model": args.model, "figure": cells} | machine()))


class Prefills:
    """Steps of one prompt each, on the pool and the runner of an engine that has run none and is idle."""

    def __init__(self, stepper: BallonetStepper) -> None:
        self._pool: MemoryPool = stepper.engine._pool
        self._runner = stepper.engine._runner
        self._is_cuda = stepper.engine.info.device.startswith("cuda")
        self._steps = itertools.count(1)
        self._random = random.Random(0)
        self._vocab_size = stepper.engine.info.vocab_size

    def compare(self, tokens: int, runs: int = _RUNS) -> dict[str, Any]:
        """Medians in seconds: `kept_s`, `offloaded_s` and until the last layer has left, `left_s`.

        Raises:
            BallonetError: there is no room for such a prompt, or a copy failed.
        """
        kept: list[float] = []
        offloaded: list[tuple[float, float]] = []
        for _ in range(_WARM_UP + runs):
            kept.append(self.kept_s(tokens))
            offloaded.append(self.offloaded_s(tokens))
        kept_s = statistics.median(kept[_WARM_UP:])
        offloaded_s, left_s = map(statistics.median, zip(*offloaded[_WARM_UP:], strict=True))
        geometry = self._pool.kv.geometry
        return {
            "tokens": tokens,
            "kept_s": round(kept_s, 6),
            "offloaded_s": round(offloaded_s, 6),
            "ratio": round(offloaded_s / kept_s, 4),
            "left_s": round(left_s, 6),
            "bytes": geometry.chunks_for(tokens) * geometry.chunk_bytes,
            "runs": runs,
        }

    def kept_s(self, tokens: int) -> float:
        """With KV that stays on the device."""
        chain = TokenChain("", self._pool.kv.geometry.tokens_per_chunk)
        opened = self._pool.open_slot(None, chain, tokens)
        if opened is None:
            raise BallonetError("the engine is not idle: no slot is free")
        plan = self._plan(opened.slot, tokens, is_staged=False)
        self._reserve([(opened.slot, tokens)], plan)
        started = time.perf_counter()
        logits = self._runner.run(plan, None)
        seconds = self._finish(plan, logits, started)
        self._pool.close_slot(opened.slot, chain, ())
        return seconds

    def offloaded_s(self, tokens: int) -> tuple[float, float]:
        """Layer-wise: until the logits are there, and until the last layer has left."""
        layer_wise = self._pool.layer_wise
        offload = layer_wise.begin(Backing(), tokens) if layer_wise else None
        if layer_wise is None or offload is None:
            raise BallonetError(f"the balloon has no room for {tokens} tokens")
        plan = self._plan(offload.slot, tokens, is_staged=True)
        self._reserve([], plan)
        started = time.perf_counter()
        logits = self._runner.run(plan, offload)
        seconds = self._finish(plan, logits, started)
        offload.wait()
        left_s = time.perf_counter() - started
        layer_wise.cancel(offload)
        return seconds, left_s

    def _plan(self, slot: int, tokens: int, is_staged: bool) -> StepPlan:
        prompt = tuple(self._random.choices(range(self._vocab_size), k=tokens))
        piece = Piece("prefill", slot, 0, 0, prompt, samples=True)
        return StepPlan(next(self._steps), (piece,), num_decodes=0, has_staged=is_staged)

    def _reserve(self, growth: list[tuple[int, int]], plan: StepPlan) -> None:
        if not self._pool.reserve(growth, plan.num_tokens, plan.num_rows, plan.staged_tokens):
            raise BallonetError(f"the pool has no room for {plan.num_tokens} tokens")
        self._pool.launched(plan.step)

    def _finish(self, plan: StepPlan, logits: torch.Tensor, started: float) -> float:
        """Seconds since then, once the logits are there. Copies on other streams go on."""
        if self._is_cuda:
            torch.cuda.current_stream(logits.device).synchronize()
        seconds = time.perf_counter() - started
        self._pool.finished(plan.step)
        return seconds


def row(cell: dict[str, Any]) -> str:
    """One length, for reading."""
    kept, offloaded, left = (cell[name] * 1e3 for name in ("kept_s", "offloaded_s", "left_s"))
    return (
        f"{cell['tokens']:>7} tokens: {kept:9.2f} ms kept, {offloaded:9.2f} ms offloaded, ratio "
        f"{cell['ratio']:.4f}; {cell['bytes'] / 2**20:.0f} MiB gone after {left:.2f} ms"
    )


if __name__ == "__main__":
    main()
