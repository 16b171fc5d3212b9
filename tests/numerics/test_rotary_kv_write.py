"""Norm, rotation and writing in one: queries turn in place, keys and values land in their places alone."""

from __future__ import annotations

import pytest
import torch

from tests.numerics import oracle
from tests.numerics.cases import DTYPES, NUM_LAYERS, TOLERANCES, Backend, random

THETA = 10000.0
MAX_POSITIONS = 300
EPS = 1e-5
NUM_ROWS = 40
# (first row, position) of each token: the ends of rows of any length, far positions, row 0 as padding has.
TOKENS = [(7, 0), (2, 15), (0, 0), (4, 37), (7, 63), (1, 16), (3, 95), (5, 23), (5, 24), (0, 1)]
SHAPES = [(9, 3, 64), (4, 4, 16), (8, 2, 128), (6, 2, 96), (3, 1, 256), (1, 1, 2), (40, 8, 128), (28, 4, 32)]


def tables(head_dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = THETA ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(MAX_POSITIONS, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float().to(device), angles.sin().float().to(device)


def check(
    backend: Backend,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    t: int = 16,
    tokens: list[tuple[int, int]] = TOKENS,
    norms: tuple[bool, bool] = (False, False),
) -> None:
    query_heads, kv_heads, dim = heads
    device = backend.device
    packed = random(len(tokens), query_heads + 2 * kv_heads, dim, dtype=dtype, device=device)
    pool = random(NUM_ROWS, NUM_LAYERS, 2, t, kv_heads, dim, dtype=dtype, device=device)
    before, pool_before = packed.clone(), pool.clone()
    q, k, v = packed.split([query_heads, kv_heads, kv_heads], dim=1)
    weights = [random(dim, dtype=dtype, device=device) if has else None for has in norms]
    first_rows = torch.tensor([row for row, _ in tokens], dtype=torch.int64, device=device)
    positions = torch.tensor([position for _, position in tokens], dtype=torch.int64, device=device)
    backend.kernels.rotary_and_kv_write(
        q, k, v, *tables(dim, device), positions, pool[:, 1], first_rows, *weights, EPS
    )

    old_q, old_k, old_v = before.split([query_heads, kv_heads, kv_heads], dim=1)
    assert_turned(q, old_q, positions, weights[0])
    assert torch.equal(v, old_v), "values must not turn"
    rows, offsets = first_rows + positions // t, positions % t
    assert_turned(pool[rows, 1, 0, offsets], old_k, positions, weights[1])
    assert torch.equal(pool[rows, 1, 1, offsets], old_v), "values must arrive bit for bit"
    pool[rows, 1, :, offsets] = pool_before[rows, 1, :, offsets]
    assert torch.equal(pool, pool_before), "nothing else may change"


def assert_turned(
    actual: torch.Tensor, old: torch.Tensor, positions: torch.Tensor, norm: torch.Tensor | None
) -> None:
    """The norm is rounded before rotation: a rounding more than a rotation of the exact norm has."""
    x = old if norm is None else oracle.rms_norm(old, norm, EPS)
    rtol, atol = TOLERANCES[actual.dtype]
    expected = oracle.rotary(x, positions, THETA)
    torch.testing.assert_close(actual.double().cpu(), expected, rtol=rtol, atol=2 * atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_packed_buffer(backend: Backend, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(backend, heads, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(8, 2, 128), (6, 2, 96), (9, 3, 64)], ids=str)
def test_norms_of_heads(backend: Backend, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(backend, heads, dtype, norms=(True, True))


@pytest.mark.parametrize("norms", [(True, False), (False, True)], ids=str)
def test_one_norm(backend: Backend, norms: tuple[bool, bool]) -> None:
    check(backend, (4, 2, 32), torch.float32, norms=norms)


@pytest.mark.parametrize("t", [1, 5, 16, 24])
def test_a_prefill_piece_across_rows(backend: Backend, t: int) -> None:
    tokens = [(3, position) for position in range(t - 1, min(8 * t, t + 30))]
    check(backend, (3, 1, 32), torch.float32, t, tokens)


def test_the_rounding_of_separate_steps(backend: Backend) -> None:
    """Norm, rounding, rotation: what three kernels of their own gave, so that answers stay the same.

    float16, because Triton's interpreter cuts bfloat16 off instead of rounding it.
    """
    dim, position = 64, 17
    x = random(1, 3, dim, dtype=torch.float16, device=backend.device)
    weight = random(dim, dtype=torch.float16, device=backend.device)
    normed = backend.kernels.rms_norm(x, weight, EPS, torch.empty_like(x))
    cos, sin = tables(dim, backend.device)
    low, high = normed.float().chunk(2, dim=-1)
    c, s = cos[position], sin[position]
    expected = torch.cat([low * c - high * s, high * c + low * s], dim=-1).to(x.dtype)

    q, k, v = x[:, :1].clone(), x[:, 1:2].clone(), x[:, 2:].clone()
    kv = torch.zeros(2, 2, 32, 1, dim, dtype=x.dtype, device=backend.device)
    positions = torch.tensor([position], device=backend.device)
    backend.kernels.rotary_and_kv_write(
        q, k, v, cos, sin, positions, kv, torch.ones_like(positions), weight, weight, EPS
    )
    written = torch.cat([q, kv[1, 0, position][None]], dim=1)
    # A fused multiply-add rounds once less: the last bit of a few values.
    torch.testing.assert_close(written, expected[:, :2], rtol=2**-9, atol=2**-12)
    assert (written != expected[:, :2]).float().mean() < 0.05


def test_no_tokens(backend: Backend) -> None:
    check(backend, (4, 2, 32), torch.float32, tokens=[])


@pytest.mark.gpu
@pytest.mark.parametrize("is_normed", [False, True])
def test_llama_8b_prefill(backend: Backend, is_normed: bool) -> None:
    tokens = [(row, position) for row in (0, 20) for position in range(250)]
    check(backend, (32, 8, 128), torch.bfloat16, 16, tokens, (is_normed, is_normed))
