"""Kernels touch mapped rows alone, however far apart they lie in the address space."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import triton_backend
from tests.numerics import oracle
from tests.numerics.cases import assert_close, int32, poisoned_like, random

ROOT = Path(__file__).parents[2]


INTERPRETED = pytest.param(
    "triton_backend",
    # Seen with Triton 3.6 beside NumPy 2.5: "only 0-dimensional arrays can be converted".
    marks=pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted only where there is no GPU"),
)


@pytest.mark.parametrize("name", ["reference", INTERPRETED])
def test_unmapped_rows_are_never_touched(name: str) -> None:
    """In a process of its own: a wrong access would take the test run with it."""
    run = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-m", "tests.numerics.sparse_pool", name],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.gpu
def test_offsets_beyond_32_bits(device: torch.device) -> None:
    t, heads, dim, length = 64, 8, 128, 300
    num_rows = (1 << 31) // (2 * t * heads * dim) + 8
    kv = torch.empty(num_rows, 2, t, heads, dim, dtype=torch.bfloat16, device=device)
    row = num_rows - 5
    assert row * kv.stride(0) >= 1 << 31
    k = random(length, heads, dim, dtype=kv.dtype, device=device)
    v = random(length, heads, dim, dtype=kv.dtype, device=device)
    rows = torch.full((length,), row, device=device)
    q = random(length, 32, dim, dtype=kv.dtype, device=device)
    cos, sin = torch.ones(length, dim // 2, device=device), torch.zeros(length, dim // 2, device=device)
    positions = torch.arange(length, device=device)
    triton_backend.rotary_and_kv_write(q, k, v, cos, sin, positions, kv, rows, None, None, 0.0)
    lens = int32([length], device)
    places = rows[:1], torch.zeros_like(rows[:1]), int32([0], device)
    out = triton_backend.prefill_attention(
        q, kv, int32([0, length], device), *places, lens, length, 0.1, poisoned_like(q)
    )
    expected = oracle.attention(q, k.cpu(), v.cpu(), 0.1)
    assert_close(out, expected)
    workspace = torch.empty(triton_backend.decode_workspace_floats(32, heads, dim), device=device)
    triton_backend.decode_plan(kv, lens, workspace)
    last = triton_backend.decode_attention(q[-1:], kv, *places, lens, 0.1, workspace, poisoned_like(q[-1:]))
    assert_close(last, expected[-1:])
