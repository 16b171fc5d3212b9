"""RMS norm and its fused addition against the oracle, at odd widths, strided and in place."""

from __future__ import annotations

import pytest
import torch

from tests.numerics import oracle
from tests.numerics.cases import DTYPES, Backend, assert_close, poisoned_like, random, strided

EPS = 1e-5
SHAPES = [(1, 16), (5, 576), (3, 100), (2, 4096), (7, 3, 64), (1, 9, 96), (40, 5, 128), (2, 1, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = strided(random(*shape, dtype=dtype, device=backend.device))
    weight = random(shape[-1], dtype=dtype, device=backend.device)
    out = strided(poisoned_like(x), extra=32)
    assert backend.kernels.rms_norm(x, weight, EPS, out) is out
    assert_close(out, oracle.rms_norm(x, weight, EPS))


@pytest.mark.parametrize("shape", [(5, 576), (7, 3, 64)], ids=str)
def test_rms_norm_in_place(backend: Backend, shape: tuple[int, ...]) -> None:
    x = strided(random(*shape, dtype=torch.float32, device=backend.device))
    weight = random(shape[-1], dtype=torch.float32, device=backend.device)
    expected = oracle.rms_norm(x, weight, EPS)
    backend.kernels.rms_norm(x, weight, EPS, x)
    assert_close(x, expected)


def test_heads_of_a_packed_buffer_leave_their_neighbours_alone(backend: Backend) -> None:
    packed = random(6, 5 * 64, dtype=torch.float32, device=backend.device)
    before = packed.clone()
    weight = random(64, dtype=torch.float32, device=backend.device)
    keys = packed[:, 3 * 64 : 4 * 64].view(6, 1, 64)
    backend.kernels.rms_norm(keys, weight, EPS, keys)
    assert torch.equal(packed[:, : 3 * 64], before[:, : 3 * 64])
    assert torch.equal(packed[:, 4 * 64 :], before[:, 4 * 64 :])
    assert_close(packed[:, 3 * 64 : 4 * 64], oracle.rms_norm(before[:, 3 * 64 : 4 * 64], weight, EPS))


def test_tiny_and_huge_values(backend: Backend) -> None:
    """A row of zeros stays zero, and float16 values whose squares overflow float16 do not."""
    x = torch.stack([torch.zeros(64), torch.full((64,), 4e4)]).half().to(backend.device)
    weight = torch.ones(64, dtype=torch.float16, device=backend.device)
    out = backend.kernels.rms_norm(x, weight, EPS, poisoned_like(x))
    assert_close(out, oracle.rms_norm(x, weight, EPS))


@pytest.mark.parametrize("is_in_place", [False, True], ids=["out", "in-place"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (5, 576), (3, 100), (2, 4096)], ids=str)
def test_add_rms_norm(
    backend: Backend, shape: tuple[int, int], dtype: torch.dtype, is_in_place: bool
) -> None:
    x = strided(random(*shape, dtype=dtype, device=backend.device))
    residual = random(*shape, dtype=dtype, device=backend.device)
    weight = random(shape[-1], dtype=dtype, device=backend.device)
    total = (x.double() + residual.double()).cpu()
    out = x if is_in_place else poisoned_like(x)
    assert backend.kernels.add_rms_norm(x, residual, weight, EPS, out) is out
    assert_close(residual, total)
    assert_close(out, oracle.rms_norm(residual, weight, EPS))


@pytest.mark.parametrize("shape", [(0, 64), (0, 3, 64)], ids=str)
def test_no_tokens(backend: Backend, shape: tuple[int, ...]) -> None:
    x = torch.empty(*shape, device=backend.device)
    weight = torch.ones(64, device=backend.device)
    assert backend.kernels.rms_norm(x, weight, EPS, torch.empty_like(x)).shape == shape


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_llama_8b(backend: Backend, dtype: torch.dtype) -> None:
    x = random(8192, 4096, dtype=dtype, device=backend.device)
    weight = random(4096, dtype=dtype, device=backend.device)
    out = backend.kernels.rms_norm(x, weight, EPS, poisoned_like(x))
    assert_close(out, oracle.rms_norm(x, weight, EPS))
