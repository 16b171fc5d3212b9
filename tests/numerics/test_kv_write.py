"""Writing keys and values: every token lands in its place, bit for bit, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from tests.numerics.cases import DTYPES, NUM_LAYERS, Backend, random, strided


def check(
    backend: Backend, tokens: list[tuple[int, int]], t: int, heads: int, dim: int, dtype: torch.dtype
) -> None:
    """`tokens`: (first row, position) of each."""
    device = backend.device
    pool = random(12, NUM_LAYERS, 2, t, heads, dim, dtype=dtype, device=device)
    expected = pool.clone()
    k = strided(random(len(tokens), heads, dim, dtype=dtype, device=device))
    v = strided(random(len(tokens), heads, dim, dtype=dtype, device=device), extra=64)
    for index, (row, position) in enumerate(tokens):
        expected[row + position // t, 1, 0, position % t] = k[index]
        expected[row + position // t, 1, 1, position % t] = v[index]
    first_rows = torch.tensor([row for row, _ in tokens], dtype=torch.int64, device=device)
    positions = torch.tensor([position for _, position in tokens], dtype=torch.int64, device=device)
    backend.kernels.kv_write(pool[:, 1], k, v, first_rows, positions)
    assert torch.equal(pool, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "dim"), [(1, 16), (3, 64), (2, 96), (8, 128), (1, 256)])
def test_ragged_tokens(backend: Backend, heads: int, dim: int, dtype: torch.dtype) -> None:
    t = 16
    tokens = [(7, 0), (2, t - 1), (0, t), (4, 2 * t + 5), (7, 3 * t + 15)]
    check(backend, tokens, t, heads, dim, dtype)


@pytest.mark.parametrize("t", [1, 5, 16, 24])
def test_a_prefill_piece_across_rows(backend: Backend, t: int) -> None:
    check(backend, [(3, position) for position in range(t - 1, min(8 * t, t + 30))], t, 3, 32, torch.float32)


def test_one_token(backend: Backend) -> None:
    check(backend, [(5, 17)], 16, 3, 64, torch.float32)


def test_no_tokens(backend: Backend) -> None:
    check(backend, [], 16, 3, 64, torch.float32)
