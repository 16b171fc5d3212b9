"""Decode speed on a CPU: this engine and transformers' `generate`, side by side in one run.

The floor of a decode step at batch 1 is reading the weights once: their bytes over the memory
bandwidth that a plain sum over them reaches here. Rounds alternate between the two, so that a noisy
machine hurts both; medians of the rounds are reported. The last line is JSON.

    python -m tests.bench.cpu_decode
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from engine.build import build_engine
from engine.config import MIB, EngineConfig, MemoryConfig, ModelSource, SchedulerConfig
from engine.core import Engine
from engine.messages import GenerateRequest, SamplingParams, TokenDelta
from tests.bench.machine import machine
from tests.bench.models import DEMO_MODEL

PROMPT = tuple(100 + 37 * index % 40000 for index in range(32))
TOKENS = 32
ROUNDS = 5


def ignore(deltas: Sequence[TokenDelta]) -> None:
    """The tokens themselves are the tests' business."""


def engine_step_ms(engine: Engine, batch: int) -> float:
    """Median milliseconds of a decode step with `batch` sequences, prefill left out."""
    for index in range(batch):
        prompt = (index + 1, *PROMPT)
        sampling = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
        engine.submit(GenerateRequest(f"{time.monotonic_ns()}-{index}", prompt, sampling))
    while engine.snapshot.memory.kv_tokens < batch * (len(PROMPT) + 1):
        engine.step()
    steps: list[float] = []
    while True:
        started = time.perf_counter()
        if not engine.step():
            return statistics.median(steps) * 1e3
        steps.append(time.perf_counter() - started)


def transformers_step_ms(model: Any) -> float:
    """Milliseconds a token of `generate` after the first, greedy, batch 1."""
    ids = torch.tensor([PROMPT])
    options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    started = time.perf_counter()
    model.generate(ids, max_new_tokens=1, min_new_tokens=1, **options)
    first = time.perf_counter() - started
    started = time.perf_counter()
    model.generate(ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, **options)
    return float((time.perf_counter() - started - first) / (TOKENS - 1) * 1e3)


def read_gb_s(model: Any) -> float:
    """Bandwidth of reading every weight once."""
    weights = list(model.parameters())
    started = time.perf_counter()
    for weight in weights:
        weight.sum()
    return float(sum(weight.nbytes for weight in weights) / (time.perf_counter() - started) / 1e9)


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(
        str(DEMO_MODEL.parent), gguf_file=DEMO_MODEL.name, dtype=torch.float32
    )
    source = ModelSource("demo", str(DEMO_MODEL), dtype="float32")
    memory, scheduler = MemoryConfig(pool_bytes=256 * MIB), SchedulerConfig(max_num_seqs=16)
    engine = build_engine(EngineConfig(source, memory, scheduler, max_model_len=512), ignore)
    rows: dict[str, list[float]] = {"floor": [], "transformers": [], "batch_1": [], "batch_16": []}
    for _ in range(ROUNDS):
        rows["floor"].append(engine.info.weight_bytes / read_gb_s(model) / 1e6)
        rows["transformers"].append(transformers_step_ms(model))
        rows["batch_1"].append(engine_step_ms(engine, 1))
        rows["batch_16"].append(engine_step_ms(engine, 16))
    ms = {name: statistics.median(values) for name, values in rows.items()}
    ratio = 16 * ms["batch_1"] / ms["batch_16"]
    print(f"reading the weights once    {ms['floor']:7.1f} ms  (floor of batch 1)")
    print(f"transformers generate       {ms['transformers']:7.1f} ms a token")
    print(f"ballonet, batch 1           {ms['batch_1']:7.1f} ms a token, {1e3 / ms['batch_1']:.1f} tokens/s")
    print(
        f"ballonet, batch 16          {ms['batch_16']:7.1f} ms a step, {16e3 / ms['batch_16']:.1f} tokens/s"
    )
    print(f"batch 16 over batch 1       {ratio:7.1f} x the tokens/s")
    line = {
        "bench": "cpu_decode",
        "figure": {"batch_1_ms": ms["batch_1"], "batch_16_ms": ms["batch_16"], "batch_16_over_1": ratio},
        "ceiling": {"read_bytes": engine.info.weight_bytes, "floor_ms": ms["floor"]},
        "share": ms["floor"] / ms["batch_1"],
        "rival": {"name": "transformers", "ms": ms["transformers"]},
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps({**line, **machine()}))


if __name__ == "__main__":
    main()
