"""Attention kernels beside the card's ceilings: `python -m tests.bench.gpu_kernels`, on a GPU.

Llama-3.1-8B's heads in bfloat16 over a pool of shuffled sequences. The ceilings were measured on one
H100: 3.0 TB/s for reading memory, 798 TFLOP/s for a bf16 matrix product. Decodes are timed in a CUDA
graph, prefills launched from Python. The last line is JSON.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

import torch
import triton
from triton.testing import do_bench, do_bench_cudagraph

from kernels import triton_backend

CEILING_TB_S = 3.0
CEILING_TFLOP_S = 798.0
QUERY_HEADS, KV_HEADS, HEAD_DIM, TOKENS_PER_ROW, LAYERS = 32, 8, 128, 128, 4
DECODES = [(256, 1024), (64, 8192), (16, 32768), (4, 131072), (1, 131072), (8, 4096), (1, 1024)]
PREFILLS = [(1, 4096, 0), (1, 16384, 0), (1, 65536, 0), (8, 2048, 14336), (1, 512, 16384), (16, 64, 4096)]


def pool(num_sequences: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer's view of random KV, and each sequence's first row, in shuffled order."""
    num_rows = -(-context // TOKENS_PER_ROW)
    shape = (num_sequences * num_rows, LAYERS, 2, TOKENS_PER_ROW, KV_HEADS, HEAD_DIM)
    kv = torch.empty(shape, dtype=torch.bfloat16, device="cuda")[:, 1]
    for first in range(0, kv.shape[0], 1024):  # `normal_` on a strided view works in a copy of it
        kv[first : first + 1024].normal_()
    return kv, torch.randperm(num_sequences, device="cuda") * num_rows


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def decode(batch: int, context: int) -> Callable[[], torch.Tensor]:
    kv, first_rows = pool(batch, context)
    q = torch.randn(batch, QUERY_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    lens, out = int32([context] * batch), torch.empty_like(q)
    scale = HEAD_DIM**-0.5
    return lambda: triton_backend.decode_attention(q, kv, first_rows, lens, context, scale, out)


def prefill(batch: int, queries: int, cached: int) -> Callable[[], torch.Tensor]:
    kv, first_rows = pool(batch, queries + cached)
    q = torch.randn(batch * queries, QUERY_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    starts = int32([index * queries for index in range(batch + 1)])
    lens, out = int32([queries + cached] * batch), torch.empty_like(q)
    scale = HEAD_DIM**-0.5
    return lambda: triton_backend.prefill_attention(q, kv, starts, first_rows, lens, queries, scale, out)


def commit() -> str:
    """The checkout's commit, or `unknown` outside one."""
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


def main() -> None:
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to measure here")
        return
    results: dict[str, float] = {}
    for batch, context in DECODES:
        ms = do_bench_cudagraph(decode(batch, context), return_mode="median")
        rate = batch * context * KV_HEADS * HEAD_DIM * 2 * 2 / ms / 1e9
        name = f"decode {batch} x {context}"
        results[name] = round(rate, 3)
        print(f"{name:28} {ms:9.3f} ms {rate:8.2f} TB/s    {rate / CEILING_TB_S:6.1%} of {CEILING_TB_S}")
    for batch, queries, cached in PREFILLS:
        ms = do_bench(prefill(batch, queries, cached), return_mode="median")
        pairs = queries * cached + queries * (queries + 1) / 2
        rate = 4 * batch * QUERY_HEADS * HEAD_DIM * pairs / ms / 1e9
        name = f"prefill {batch} x {queries} + {cached}"
        results[name] = round(rate, 1)
        print(
            f"{name:28} {ms:9.3f} ms {rate:8.1f} TFLOP/s {rate / CEILING_TFLOP_S:6.1%} of {CEILING_TFLOP_S}"
        )
    machine = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
    }
    print(json.dumps({**machine, "results": results}))


if __name__ == "__main__":
    main()
