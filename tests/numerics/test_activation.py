"""The gated activation against the oracle, at widths around and across a program's block."""

from __future__ import annotations

import pytest
import torch

from tests.numerics import oracle
from tests.numerics.cases import DTYPES, Backend, assert_close, poisoned_like, random, strided


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (3, 100), (2, 1024), (5, 1536), (1, 2049)])
def test_silu_and_mul(backend: Backend, tokens: int, width: int, dtype: torch.dtype) -> None:
    gate_up = strided(random(tokens, 2 * width, dtype=dtype, device=backend.device))
    out = strided(random(tokens, width, dtype=dtype, device=backend.device).fill_(float("nan")))
    assert backend.kernels.silu_and_mul(gate_up, out) is out
    assert_close(out, oracle.silu_and_mul(gate_up))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # infinity is what a GPU computes too
def test_large_gates_saturate(backend: Backend) -> None:
    gate_up = torch.tensor([[-200.0, 200.0, 0.0, 2.0, 3.0, 5.0]], device=backend.device)
    out = backend.kernels.silu_and_mul(gate_up, poisoned_like(gate_up[:, :3]))
    assert_close(out, torch.tensor([[0.0, 600.0, 0.0]], dtype=torch.float64))


def test_no_tokens(backend: Backend) -> None:
    gate_up = torch.empty(0, 8, device=backend.device)
    out = torch.empty(0, 4, device=backend.device)
    assert backend.kernels.silu_and_mul(gate_up, out).shape == (0, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_llama_8b(backend: Backend, dtype: torch.dtype) -> None:
    gate_up = random(1024, 2 * 14336, dtype=dtype, device=backend.device)
    out = backend.kernels.silu_and_mul(gate_up, poisoned_like(gate_up[:, :14336]))
    assert_close(out, oracle.silu_and_mul(gate_up))
