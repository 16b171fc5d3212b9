"""A program that runs the kernels over a pool as the engine has it: 64 GiB of addresses, a few rows mapped.

A read or write outside the mapped rows ends the process with SIGSEGV; a wrong result ends it with an
exception. `python -m tests.numerics.sparse_pool reference|triton`, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from importlib import import_module
from typing import NamedTuple, cast

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
LONGEST = 3 * T + 5
# The owner of the shared prefix ends with the reservation; each row's neighbours stay unmapped.
OWNER = NUM_ROWS - 4


class Place(NamedTuple):
    """A sequence, and where its KV lies; its own rows of what it shares are not mapped."""

    length: int
    first_row: int
    shared_rows: int = 0


PLACES = [
    Place(1, 10),
    Place(T - 1, NUM_ROWS // 2),
    Place(2 * T + 3, 40, 2),
    Place(T, NUM_ROWS - 50),
    Place(T + 1, NUM_ROWS - 20),
    Place(LONGEST, OWNER),
    Place(3 * T + 1, NUM_ROWS // 4, 3),
    Place(3 * T, NUM_ROWS // 3, 1),
]


def main(name: str) -> None:
    kernels = cast(Kernels, import_module(f"kernels.{name}"))
    pool = reserve()
    kv = pool[:, 1]
    lengths = [place.length for place in PLACES]
    shared = [place.shared_rows * T for place in PLACES]
    first_rows = torch.tensor([place.first_row for place in PLACES])
    shared_lens = torch.tensor(shared, dtype=torch.int32)
    places = first_rows, torch.where(shared_lens > 0, OWNER, 0), shared_lens
    context_lens = torch.tensor(lengths, dtype=torch.int32)
    new = [length - shared for length, shared in zip(lengths, shared, strict=True)]
    positions = torch.cat([torch.arange(a, b) for a, b in zip(shared, lengths, strict=True)])
    k, v = torch.randn(2, sum(new), HEADS, DIM)
    q = torch.randn(sum(new), 2 * HEADS, DIM)
    cos, sin = torch.ones(LONGEST, DIM // 2), torch.zeros(LONGEST, DIM // 2)  # turns nothing
    rows = first_rows.repeat_interleave(torch.tensor(new))
    kernels.rotary_and_kv_write(q, k, v, cos, sin, positions, kv, rows, None, None, 0.0)
    starts = torch.tensor([0, *new]).cumsum(0)
    last = starts[1:] - 1
    prefilled = kernels.prefill_attention(
        q, kv, starts.int(), *places, context_lens, LONGEST, 0.2, poisoned_like(q)
    )
    workspace = torch.empty(kernels.decode_workspace_floats(2 * HEADS, HEADS, DIM))
    kernels.decode_plan(kv, context_lens, workspace)
    decoded = kernels.decode_attention(
        q[last], kv, *places, context_lens, 0.2, workspace, poisoned_like(q[last])
    )
    prefix = int(starts[[place.first_row for place in PLACES].index(OWNER)])
    for index, (begin, end) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        keys, values = (
            torch.cat([both[prefix : prefix + shared[index]], both[begin:end]]) for both in (k, v)
        )
        assert_close(prefilled[begin:end], oracle.attention(q[begin:end], keys, values, 0.2))
    assert_close(decoded, prefilled[last].double())


def reserve() -> torch.Tensor:
    """(rows, layers, 2, T, heads, dim) of which only the sequences' rows may be touched."""
    memory = mmap.mmap(-1, ADDRESS_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    pool = torch.frombuffer(memory, dtype=torch.float32).view(NUM_ROWS, LAYERS, 2, T, HEADS, DIM)
    protect(pool.data_ptr(), ADDRESS_BYTES, 0)
    for length, first_row, shared_rows in PLACES:
        begin, end = first_row + shared_rows, first_row + -(-length // T)
        num_bytes = (end - begin) * ROW_BYTES
        protect(pool.data_ptr() + begin * ROW_BYTES, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE)
        pool[begin:end] = float("nan")
    return pool


def protect(address: int, num_bytes: int, protection: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), protection) != 0:
        raise OSError(ctypes.get_errno(), "mprotect failed")


if __name__ == "__main__":
    main(sys.argv[1])
