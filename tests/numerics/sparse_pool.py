"""A program that runs the kernels over a pool as the engine has it: 64 GiB of addresses, a few rows mapped.

A read or write outside the mapped rows ends the process with SIGSEGV; a wrong result ends it with an
exception. `python -m tests.numerics.sparse_pool reference|triton`, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from importlib import import_module
from typing import cast

import torch

from kernels.backend import Kernels
from tests.numerics import oracle
from tests.numerics.cases import assert_close, poisoned_like

ADDRESS_BYTES = 64 << 30
MAP_NORESERVE = 0x4000  # Linux's value; the mmap module names it from Python 3.13 on
LAYERS, T, HEADS, DIM = 2, 16, 2, 32
ROW_ELEMENTS = LAYERS * 2 * T * HEADS * DIM
ROW_BYTES = 4 * ROW_ELEMENTS  # 16 KiB: whole pages
NUM_ROWS = ADDRESS_BYTES // ROW_BYTES
LENGTHS = [1, T - 1, T, T + 1, 3 * T + 5]
# The last sequence ends with the reservation; each row's neighbours stay unmapped.
FIRST_ROWS = [10, NUM_ROWS // 2, NUM_ROWS - 50, NUM_ROWS - 20, NUM_ROWS - 4]


def main(name: str) -> None:
    kernels = cast(Kernels, import_module(f"kernels.{name}"))
    pool = reserve()
    kv = pool[:, 1]
    first_rows = torch.tensor(FIRST_ROWS)
    context_lens = torch.tensor(LENGTHS, dtype=torch.int32)
    rows = torch.cat([torch.full((length,), row) for length, row in zip(LENGTHS, FIRST_ROWS, strict=True)])
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    k, v = torch.randn(2, len(rows), HEADS, DIM)
    q = torch.randn(len(rows), 2 * HEADS, DIM)
    cos, sin = torch.ones(max(LENGTHS), DIM // 2), torch.zeros(max(LENGTHS), DIM // 2)  # turns nothing
    kernels.rotary_and_kv_write(q, k, v, cos, sin, positions, kv, rows, None, None, 0.0)
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)
    last = starts[1:] - 1
    prefilled = kernels.prefill_attention(
        q, kv, starts.int(), first_rows, context_lens, max(LENGTHS), 0.2, poisoned_like(q)
    )
    workspace = torch.empty(kernels.decode_workspace_floats(2 * HEADS, HEADS, DIM))
    kernels.decode_plan(kv, context_lens, workspace)
    decoded = kernels.decode_attention(
        q[last], kv, first_rows, context_lens, 0.2, workspace, poisoned_like(q[last])
    )
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        expected = oracle.attention(q[begin:end], k[begin:end], v[begin:end], 0.2)
        assert_close(prefilled[begin:end], expected)
    assert_close(decoded, prefilled[last].double())


def reserve() -> torch.Tensor:
    """(rows, layers, 2, T, heads, dim) of which only the sequences' rows may be touched."""
    memory = mmap.mmap(-1, ADDRESS_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    pool = torch.frombuffer(memory, dtype=torch.float32).view(NUM_ROWS, LAYERS, 2, T, HEADS, DIM)
    protect(pool.data_ptr(), ADDRESS_BYTES, 0)
    for length, row in zip(LENGTHS, FIRST_ROWS, strict=True):
        num_rows = -(-length // T)
        protect(pool.data_ptr() + row * ROW_BYTES, num_rows * ROW_BYTES, mmap.PROT_READ | mmap.PROT_WRITE)
        pool[row : row + num_rows] = float("nan")
    return pool


def protect(address: int, num_bytes: int, protection: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), protection) != 0:
        raise OSError(ctypes.get_errno(), "mprotect failed")


if __name__ == "__main__":
    main(sys.argv[1])
