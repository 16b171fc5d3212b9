"""A few rows times a matrix against float64, at widths around and across a program's block."""

from __future__ import annotations

import pytest
import torch

from tests.numerics.cases import DTYPES, Backend, assert_close, poisoned_like, random, strided

SHAPES = [(1, 1), (7, 16), (33, 100), (128, 576), (64, 4096), (9, 4097), (70, 5120), (3, 14336)]


def expected(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product = x.double().cpu() @ weight.double().cpu().t()
    return product if bias is None else product + bias.double().cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_out", "num_in"), SHAPES)
@pytest.mark.parametrize(
    ("num_rows", "has_bias"), [(1, False), (1, True), (2, False), (7, True), (16, False)]
)
def test_skinny_matmul(
    backend: Backend, num_rows: int, num_out: int, num_in: int, has_bias: bool, dtype: torch.dtype
) -> None:
    where = {"dtype": dtype, "device": backend.device}
    x = strided(random(num_rows, num_in, **where))
    weight = strided(random(num_out, num_in, **where) * num_in**-0.5)
    bias = random(num_out, **where) if has_bias else None
    out = poisoned_like(random(num_rows, num_out, **where))
    assert backend.kernels.skinny_matmul(x, weight, bias, out) is out
    assert_close(out, expected(x, weight, bias))


def test_wrong_arguments_are_named(device: torch.device) -> None:
    from kernels import triton_backend

    x, weight = torch.zeros(1, 32, device=device), torch.zeros(8, 32, device=device)
    good = {"x": x, "weight": weight, "bias": None, "out": torch.zeros(1, 8, device=device)}
    triton_backend.skinny_matmul(**good)
    bad = {
        "x": torch.zeros(17, 32, device=device),
        "weight": weight.t(),
        "bias": torch.zeros(7, device=device),
        "out": torch.zeros(1, 8, dtype=torch.float16, device=device),
    }
    for name, value in bad.items():
        with pytest.raises(ValueError, match=f"^{name} must be"):
            triton_backend.skinny_matmul(**{**good, name: value})


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 2, 13, 16])
@pytest.mark.parametrize(("num_out", "num_in"), [(6144, 4096), (4096, 14336), (128256, 4096)])
def test_llama_8b(backend: Backend, num_rows: int, num_out: int, num_in: int) -> None:
    where = {"dtype": torch.bfloat16, "device": backend.device}
    x, weight = random(num_rows, num_in, **where), random(num_out, num_in, **where) * num_in**-0.5
    out = backend.kernels.skinny_matmul(x, weight, None, poisoned_like(random(num_rows, num_out, **where)))
    assert_close(out, expected(x, weight, None))
