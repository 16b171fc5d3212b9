"""One row times a matrix, as a decode of one sequence needs it. Semantics: `kernels.reference.matvec`.

It takes as long as reading the weights. On an H100 in bfloat16, with weights too many for the cache:

    (out, in)        cuBLAS    here
    6144 x 4096      2.31      2.72 TB/s
    4096 x 4096      1.98      2.47
    28672 x 4096     2.80      3.02
    4096 x 14336     2.58      2.68
    128256 x 4096    2.76      3.15
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from kernels.checks import require, require_launchable, require_like

_MAX_BLOCK = 4096  # inputs a program holds of one output row at once
_LOOP_BLOCK = 1024  # the same, and of how many rows, where a row takes several turns
_LOOP_ROWS = 8
_NUM_WARPS = 8


@triton.jit
def _matvec_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_out,
    num_in,
    weight_stride,
    HAS_BIAS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    IS_EVEN: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    columns = tl.arange(0, BLOCK_IN)
    is_row = rows < num_out
    weight_ptrs = weight_ptr + rows.to(tl.int64)[:, None] * weight_stride + columns[None, :]
    acc = tl.zeros([BLOCK_OUT, BLOCK_IN], dtype=tl.float32)
    for first in range(0, num_in, BLOCK_IN):
        if IS_EVEN:
            x = tl.load(x_ptr + first + columns)
            weight = tl.load(weight_ptrs + first, mask=is_row[:, None], other=0.0)
        else:
            is_column = first + columns < num_in
            x = tl.load(x_ptr + first + columns, mask=is_column, other=0.0)
            weight = tl.load(weight_ptrs + first, mask=is_row[:, None] & is_column[None, :], other=0.0)
        acc += weight.to(tl.float32) * x.to(tl.float32)[None, :]
    result = tl.sum(acc, 1)
    if HAS_BIAS:
        result += tl.load(bias_ptr + rows, mask=is_row, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows, result.to(out_ptr.dtype.element_ty), mask=is_row)


def matvec(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> torch.Tensor:
    """See `kernels.reference.matvec`. Raises ValueError naming an argument that is wrong."""
    require(weight.dim() == 2 and weight.stride(1) == 1, "weight", "of shape (out, in) with packed rows")
    require_launchable("weight", weight)
    num_out, num_in = weight.shape
    require_like("x", x, (1, num_in), weight)
    require_like("out", out, (1, num_out), weight)
    if bias is not None:
        require_like("bias", bias, (num_out,), weight)
    block_out, block_in = _blocks(num_in)
    _matvec_kernel[(triton.cdiv(num_out, block_out),)](
        x, weight, weight if bias is None else bias, out, num_out, num_in, weight.stride(0),
        HAS_BIAS=bias is not None, BLOCK_OUT=block_out, BLOCK_IN=block_in,
        IS_EVEN=num_in % block_in == 0, num_warps=_NUM_WARPS,
    )  # fmt: skip
    return out


@cache
def _blocks(num_in: int) -> tuple[int, int]:
    """Outputs and inputs of a program's turn: a whole row if it is short enough to hold."""
    whole = max(16, triton.next_power_of_2(num_in))
    return (_MAX_BLOCK // whole, whole) if whole <= _MAX_BLOCK else (_LOOP_ROWS, _LOOP_BLOCK)
