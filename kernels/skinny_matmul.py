"""A few rows times a matrix: decodes of few sequences. Semantics: `kernels.reference.skinny_matmul`.

It takes as long as reading the weights, for one row as for sixteen. On an H100 in bfloat16, with weights too
many for the cache, TB/s:

    (out, in)        1 row: cuBLAS    here    16 rows: cuBLAS    here
    6144 x 4096               2.41    2.87               2.36    2.52
    4096 x 4096               2.03    2.73               2.00    2.49
    28672 x 4096              2.76    3.08               2.81    2.90
    4096 x 14336              2.63    2.86               2.58    2.74
    128256 x 4096             2.79    3.16               2.77    3.02
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from kernels.checks import require, require_launchable, require_like
from kernels.dependent_launch import launch_options, start_dependents, wait_for_dependencies
from kernels.kv_tile import stages_beside, widens_operands

_MAX_BLOCK = 4096  # weights that a program of one row holds at once, of one output or of several
_LOOP_BLOCK, _LOOP_OUTPUTS = 2048, 4  # the same, of each of how many outputs, where they take several turns
_ONE_ROW_WARPS = 8  # a step of one sequence of Llama-3.1-8B 5.33 ms, with four 5.44
_TILE_ROWS, _TILE_OUT, _TILE_IN = 16, 64, 128  # the least rows that `tl.dot` takes
_MOST_STAGES = 6  # 120 KiB in bfloat16, which many GPUs before Hopper do not have


@triton.jit
def _one_row_kernel(  # type: ignore[no-untyped-def]
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
    IS_WHOLE: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    start_dependents(IS_DEPENDENT)
    outputs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inputs = tl.arange(0, BLOCK_IN)
    is_output = outputs < num_out
    weight_ptrs = weight_ptr + outputs.to(tl.int64)[:, None] * weight_stride + inputs[None, :]
    # Weights come before x: the first programs read theirs while the kernel that makes x still runs.
    weight = tl.load(weight_ptrs, mask=is_output[:, None] & (inputs < num_in)[None, :], other=0.0)
    wait_for_dependencies(IS_DEPENDENT)
    if IS_WHOLE:
        x = tl.load(x_ptr + inputs, mask=inputs < num_in, other=0.0)
        result = tl.sum(weight.to(tl.float32) * x.to(tl.float32)[None, :], 1)
    else:
        acc = tl.zeros([BLOCK_OUT, BLOCK_IN], dtype=tl.float32)
        for first in range(0, num_in, BLOCK_IN):
            is_input = first + BLOCK_IN + inputs < num_in
            next_mask = is_output[:, None] & is_input[None, :]
            next_weight = tl.load(weight_ptrs + first + BLOCK_IN, mask=next_mask, other=0.0)
            x = tl.load(x_ptr + first + inputs, mask=first + inputs < num_in, other=0.0)
            acc += weight.to(tl.float32) * x.to(tl.float32)[None, :]
            weight = next_weight
        result = tl.sum(acc, 1)
    if HAS_BIAS:
        result += tl.load(bias_ptr + outputs, mask=is_output, other=0.0).to(tl.float32)
    tl.store(out_ptr + outputs, result.to(out_ptr.dtype.element_ty), mask=is_output)


@triton.jit(do_not_specialize=["num_rows"])
def _few_rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    num_out,
    num_in,
    x_stride,
    weight_stride,
    out_stride,
    HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    STAGES: tl.constexpr,
    IS_EVEN: tl.constexpr,
    WIDENS: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    start_dependents(IS_DEPENDENT)
    rows = tl.arange(0, BLOCK_ROWS)
    outputs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inputs = tl.arange(0, BLOCK_IN)
    is_row = rows < num_rows
    is_output = outputs < num_out
    x_ptrs = x_ptr + rows[:, None] * x_stride + inputs[None, :]
    weight_ptrs = weight_ptr + outputs.to(tl.int64)[:, None] * weight_stride + inputs[None, :]
    wait_for_dependencies(IS_DEPENDENT)
    acc = tl.zeros([BLOCK_OUT, BLOCK_ROWS], dtype=tl.float32)
    for first in tl.range(0, num_in, BLOCK_IN, num_stages=STAGES):
        if IS_EVEN:
            x = tl.load(x_ptrs + first, mask=is_row[:, None], other=0.0)
            weight = tl.load(weight_ptrs + first)
        else:
            is_input = (first + inputs < num_in)[None, :]
            x = tl.load(x_ptrs + first, mask=is_row[:, None] & is_input, other=0.0)
            weight = tl.load(weight_ptrs + first, mask=is_output[:, None] & is_input, other=0.0)
        if WIDENS:
            x = x.to(tl.float32)
            weight = weight.to(tl.float32)
        acc = tl.dot(weight, tl.trans(x), acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + outputs, mask=is_output, other=0.0).to(tl.float32)[:, None]
    out_ptrs = out_ptr + rows[None, :] * out_stride + outputs[:, None]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=is_row[None, :] & is_output[:, None])


def skinny_matmul(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> torch.Tensor:
    """See `kernels.reference.skinny_matmul`. Raises ValueError naming an argument that is wrong."""
    require(weight.dim() == 2 and weight.stride(1) == 1, "weight", "of shape (out, in) with packed rows")
    require_launchable("weight", weight)
    num_out, num_in = weight.shape
    num_rows = x.shape[0]
    require_like("x", x, (num_rows, num_in), weight)
    require(num_rows <= _TILE_ROWS, "x", f"of {_TILE_ROWS} rows at most")
    require_like("out", out, (num_rows, num_out), weight)
    if bias is not None:
        require_like("bias", bias, (num_out,), weight)
    if num_rows == 0:
        return out
    options = launch_options(x.device)
    if num_rows == 1:
        block_out, block_in = _blocks(num_in)
        _one_row_kernel[(triton.cdiv(num_out, block_out),)](
            x, weight, weight if bias is None else bias, out, num_out, num_in, weight.stride(0),
            HAS_BIAS=bias is not None, BLOCK_OUT=block_out, BLOCK_IN=block_in,
            IS_WHOLE=num_in <= block_in, num_warps=_ONE_ROW_WARPS, **options,
        )  # fmt: skip
        return out
    _few_rows_kernel[(triton.cdiv(num_out, _TILE_OUT),)](
        x, weight, weight if bias is None else bias, out, num_rows, num_out, num_in,
        x.stride(0), weight.stride(0), out.stride(0),
        HAS_BIAS=bias is not None, BLOCK_ROWS=_TILE_ROWS, BLOCK_OUT=_TILE_OUT, BLOCK_IN=_TILE_IN,
        STAGES=_stages(x.element_size(), x.device),
        IS_EVEN=num_in % _TILE_IN == 0 and num_out % _TILE_OUT == 0,
        WIDENS=widens_operands(x.dtype), num_warps=4, **options,
    )  # fmt: skip
    return out


@cache
def _stages(element_bytes: int, device: torch.device) -> int:
    """Tiles in flight."""
    return stages_beside(0, (_TILE_OUT + _TILE_ROWS) * _TILE_IN * element_bytes, _MOST_STAGES, device)


@cache
def _blocks(num_in: int) -> tuple[int, int]:
    """Outputs and inputs of a program's turn: all inputs of an output if they are few enough to hold."""
    whole = max(16, triton.next_power_of_2(num_in))
    return (_MAX_BLOCK // whole, whole) if whole <= _MAX_BLOCK else (_LOOP_OUTPUTS, _LOOP_BLOCK)
