"""What the memory of one engine gives, in one process: started by `memory_targets`, writes JSON.

What could be had is asked of the pool, and then taken: sequences are opened and grown until the pool
refuses more, and their tokens counted. The engine is idle meanwhile, so its pool may be used from here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cluster.bench.named import named_workload
from cluster.bench.workload import RandomPlan, Workload
from engine.errors import BallonetError
from engine.memory.blocks import TokenChain
from engine.memory.pool import MemoryPool
from tests.bench import engine_options
from tests.bench.in_process import BallonetStepper, drive
from tests.bench.machine import machine
from tests.bench.models import LLAMAS, MODELS, engine_config
from tests.bench.run_engine import WARM_UP

_LOADS = dict.fromkeys(LLAMAS, "8b-256x512+256") | {"demo": "demo-8x64+32"}
_PREFILLS = 3  # of which the median counts, each with tokens of its own


class Step(NamedTuple):
    """The size of a step."""

    tokens: int
    rows: int


class Filled(NamedTuple):
    """KV that was taken before the pool refused more.

    Attributes:
        slots: that were opened for it.
        seconds: it took.
    """

    tokens: int
    slots: int
    seconds: float


def main() -> None:
    """Measure and write the file; exit status 1 for what this machine cannot run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", required=True, help="largest prefills allowed")
    parser.add_argument("--piece", type=int, required=True, help="tokens of the step that KV stands beside")
    parser.add_argument("--free-before", type=int, help="free bytes of the GPU before this process began")
    parser.add_argument("--out", type=Path, required=True)
    engine_options.add_arguments(parser)
    args = parser.parse_args()
    options = engine_options.check(parser, args)
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = engine_config(args.model, Path(folder), options)
            stepper = BallonetStepper(config)
    except BallonetError as error:
        raise SystemExit(f"{' '.join(options.words())} cannot be run: {error}") from error
    probe = Probe(stepper, config.memory.mode, config.scheduler.max_num_seqs)
    result = probe.available(args.sizes, args.piece)
    if config.memory.mode == "elastic":
        loads = [named_workload(name) for name in (WARM_UP[args.model], _LOADS[args.model])]
        result["idle"] = probe.idle(loads, args.piece, args.free_before)
    args.out.write_text(json.dumps(result | machine()))


class Probe:
    """Asks and fills the pool of an idle engine.

    Args:
        num_rows: sequences that may run at once, hence rows of logits of the largest step.
    """

    def __init__(self, stepper: BallonetStepper, mode: str, num_rows: int) -> None:
        self._stepper, self._mode, self._num_rows = stepper, mode, num_rows
        self._pool: MemoryPool = stepper.engine._pool
        self._longest = stepper.engine.info.max_model_len

    def available(self, sizes: list[int], piece: int) -> dict[str, Any]:
        """KV while decoding, by the largest prefill allowed, and beside a prefill piece of that size.

        Where activations are set aside, a smaller allowance would set less aside: those cells follow from
        this engine's room and the exact activations of each size. The largest size is this engine's own,
        and its cell is filled.
        """
        pool, arena = self._pool, self._pool.arena
        decode, beside = Step(self._num_rows, self._num_rows), Step(piece, self._num_rows)
        room = self._room(decode)
        cells = {}
        for size in sizes:
            aside = arena.chunks_for(size, self._num_rows)
            chunks = room if self._mode == "elastic" else room + arena.max_chunks - aside
            cells[str(size)] = {
                "kv_chunks": chunks,
                "kv_tokens": self._tokens(chunks),
                "activation_chunks": aside,
            }
        taken = {"decode": self.fill(decode)}
        if self._mode == "elastic":
            taken["piece"] = self.fill(beside)
        return {
            "mode": self._mode,
            "chunk_bytes": self._stepper.snapshot.memory.chunk_bytes,
            "pool_chunks": pool.chunks.total,
            "weight_bytes": self._stepper.engine.info.weight_bytes,
            "max_model_len": self._longest,
            "cells": cells,
            "beside_piece": {"kv_chunks": self._room(beside), "kv_tokens": self._tokens(self._room(beside))},
            "filled": {name: filled._asdict() for name, filled in taken.items()},
        }

    def fill(self, step: Step) -> Filled:
        """Take all KV that can be had beside a step of that size, and give it back."""
        started = time.perf_counter()
        chain = TokenChain("", self._pool.kv.geometry.tokens_per_chunk)
        slots: list[int] = []
        total = 0
        while (opened := self._pool.open_slot(None, chain, self._longest)) is not None:
            slots.append(opened.slot)
            tokens = self._grow(opened.slot, step)
            total += tokens
            if tokens < self._longest:
                break
        if self._stepper.engine.info.device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        for slot in slots:
            self._pool.close_slot(slot, chain, ())
        self._pool.check()
        return Filled(total, len(slots), seconds)

    def idle(self, loads: Sequence[Workload], piece: int, free_before: int | None) -> dict[str, Any]:
        """Device memory that an idle engine holds once it has been trimmed, and the way back.

        Args:
            loads: what it serves before.
            piece: tokens of the prompts whose time to the first token is compared.
            free_before: bytes free on the GPU before this process; None on a CPU, where the memory held
                is that of weights and chunks.
        """
        for load in loads:
            drive(self._stepper, load)
        before_s = [self._prefill_s(piece, seed) for seed in range(_PREFILLS)]
        decode = Step(self._num_rows, self._num_rows)
        held_loaded = self._held_after_fill(decode, free_before)
        trim_s, held = self._trimmed(free_before)
        after_s = self._prefill_s(piece, _PREFILLS)
        self._trimmed(free_before)
        taken_back = self.fill(decode)
        self._stepper.step()
        memory = self._stepper.snapshot.memory
        return {
            "held_bytes": held,
            "held_before_trim_bytes": held_loaded,
            "weight_bytes": self._stepper.engine.info.weight_bytes,
            "beyond_weights_bytes": held - self._stepper.engine.info.weight_bytes,
            "graph_bytes": memory.graph_bytes,
            "workspace_bytes": memory.workspace_bytes,
            "trim_s": round(trim_s, 4),
            "take_back_s": round(taken_back.seconds, 4),
            "taken_back_tokens": taken_back.tokens,
            "pool_full_chunks": memory.created,
            "prefill_tokens": piece,
            "prefill_before_trim_s": round(statistics.median(before_s), 4),
            "prefill_after_trim_s": round(after_s, 4),
        }

    def _room(self, step: Step) -> int:
        """Chunks for KV beside a step, what backs the slots of static mode included."""
        return self._pool.snapshot().kv + self._pool.room_for_kv(*step)

    def _tokens(self, chunks: int) -> int:
        """Tokens of sequences as long as they may be, and one more, that so many chunks hold.

        Where slots are backed whole, of whole slots only.
        """
        geometry, kv = self._pool.kv.geometry, self._pool.kv
        blocks = chunks // geometry.num_groups
        whole, rest = divmod(blocks, geometry.rows_for(self._longest))
        if self._mode == "static" or whole >= kv.num_slots:
            return min(whole, kv.num_slots) * self._longest
        return whole * self._longest + rest * geometry.tokens_per_chunk

    def _grow(self, slot: int, step: Step) -> int:
        """Tokens that the slot can be grown to."""
        pool, per_block = self._pool, self._pool.kv.geometry.tokens_per_chunk
        if pool.reserve([(slot, self._longest)], *step):
            return self._longest
        tokens, blocks = 0, 1 << (self._longest // per_block).bit_length()
        while blocks:
            wanted = tokens + blocks * per_block
            if wanted < self._longest and pool.reserve([(slot, wanted)], *step):
                tokens = wanted
            blocks //= 2
        return tokens

    def _prefill_s(self, tokens: int, seed: int) -> float:
        """Time to the first token of a prompt by itself."""
        vocab = self._stepper.engine.info.vocab_size
        plan = RandomPlan(1, tokens, 1, seed=seed, vocab_size=vocab)
        (record,) = drive(self._stepper, plan.workload("prefill")).records
        if record.error is not None:
            raise SystemExit(f"a prompt of {tokens} tokens failed: {record.error}")
        return record.ttft_s

    def _held_after_fill(self, step: Step, free_before: int | None) -> int:
        self.fill(step)
        self._stepper.step()
        return self._held(free_before)

    def _trimmed(self, free_before: int | None) -> tuple[float, int]:
        """Seconds that trimming took, and the bytes held after it."""
        started = time.perf_counter()
        self._stepper.engine.trim(drop_cache=True)
        self._stepper.step()
        return time.perf_counter() - started, self._held(free_before)

    def _held(self, free_before: int | None) -> int:
        if free_before is not None:
            return free_before - torch.cuda.mem_get_info()[0]
        memory = self._stepper.snapshot.memory
        return self._stepper.engine.info.weight_bytes + memory.created * memory.chunk_bytes


if __name__ == "__main__":
    main()
