"""Rotary embedding against rotation of complex numbers, in place on views of a packed buffer."""

from __future__ import annotations

import pytest
import torch

from tests.numerics import oracle
from tests.numerics.cases import DTYPES, Backend, assert_close, random

THETA = 10000.0
MAX_POSITIONS = 300


def tables(head_dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = THETA ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(MAX_POSITIONS, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float().to(device), angles.sin().float().to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "head_dim"),
    [(9, 3, 64), (4, 4, 16), (8, 2, 128), (6, 2, 96), (3, 1, 256), (1, 1, 2)],
)
def test_packed_buffer(
    backend: Backend, query_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    positions = torch.tensor([0, 1, 299, 17, 17, 64], device=backend.device)
    heads = query_heads + 2 * kv_heads
    packed = random(len(positions), heads, head_dim, dtype=dtype, device=backend.device)
    before = packed.clone()
    q, k = packed[:, :query_heads], packed[:, query_heads : query_heads + kv_heads]
    backend.kernels.rotary(q, k, *tables(head_dim, backend.device), positions)
    turned = query_heads + kv_heads
    assert_close(packed[:, :turned], oracle.rotary(before[:, :turned], positions, THETA))
    assert torch.equal(packed[:, turned:], before[:, turned:]), "values must not turn"


def test_position_zero_changes_nothing(backend: Backend) -> None:
    q = random(3, 4, 32, dtype=torch.float32, device=backend.device)
    k = random(3, 2, 32, dtype=torch.float32, device=backend.device)
    q_before, k_before = q.clone(), k.clone()
    positions = torch.zeros(3, dtype=torch.int64, device=backend.device)
    backend.kernels.rotary(q, k, *tables(32, backend.device), positions)
    assert torch.equal(q, q_before)
    assert torch.equal(k, k_before)


def test_no_tokens(backend: Backend) -> None:
    q = torch.empty(0, 4, 32, device=backend.device)
    k = torch.empty(0, 2, 32, device=backend.device)
    positions = torch.empty(0, dtype=torch.int64, device=backend.device)
    backend.kernels.rotary(q, k, *tables(32, backend.device), positions)
    assert q.shape == (0, 4, 32)
