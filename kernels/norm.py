"""RMS norm, alone and fused with the residual's addition. Semantics: `kernels.reference`.

One kernel serves both: rows of the model's width, and rows of one head's width for query and key
norms, where a program takes several so that it has enough to do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.checks import require, require_launchable, require_like
from kernels.dependent_launch import launch_options, start_dependents, wait_for_dependencies

_BLOCK_ELEMENTS = 2048


@triton.jit(do_not_specialize=["num_rows"])
def _norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    eps,
    x_token_stride,
    x_head_stride,
    residual_stride,
    out_token_stride,
    out_head_stride,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    start_dependents(IS_DEPENDENT)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    tokens = rows // HEADS
    heads = rows % HEADS
    columns = tl.arange(0, BLOCK_W)
    weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    wait_for_dependencies(IS_DEPENDENT)
    mask = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    x_ptrs = x_ptr + (tokens * x_token_stride + heads * x_head_stride)[:, None] + columns[None, :]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_ptrs = residual_ptr + (tokens * residual_stride)[:, None] + columns[None, :]
        x += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptrs, rounded, mask=mask)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)
    # Rounded before the weight, as the checkpoints' own training code does.
    normed = (x * scale[:, None]).to(out_ptr.dtype.element_ty).to(tl.float32)
    out_ptrs = out_ptr + (tokens * out_token_stride + heads * out_head_stride)[:, None] + columns[None, :]
    tl.store(out_ptrs, (normed * weight[None, :]).to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
    """See `kernels.reference.rms_norm`. Raises ValueError naming an argument that is wrong."""
    require(x.dim() in (2, 3), "x", "of shape (tokens, width) or (tokens, heads, width)")
    _check(x, weight, out)
    heads, width = (x.shape[1] if x.dim() == 3 else 1), x.shape[-1]
    num_rows = x.shape[0] * heads
    if num_rows == 0:
        return out
    block_w = triton.next_power_of_2(width)
    block_r = max(1, _BLOCK_ELEMENTS // block_w) if x.dim() == 3 else 1
    _norm_kernel[(triton.cdiv(num_rows, block_r),)](
        x, x, weight, out, num_rows, eps, x.stride(0), x.stride(-2), 0, out.stride(0), out.stride(-2),
        HEADS=heads, WIDTH=width, BLOCK_R=block_r, BLOCK_W=block_w, HAS_RESIDUAL=False,
        num_warps=_num_warps(block_w), **launch_options(x.device),
    )  # fmt: skip
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
) -> torch.Tensor:
    """See `kernels.reference.add_rms_norm`. Raises ValueError naming an argument that is wrong."""
    require(x.dim() == 2, "x", "of shape (tokens, width)")
    _check(x, weight, out)
    require_like("residual", residual, tuple(x.shape), x)
    num_tokens, width = x.shape
    if num_tokens == 0:
        return out
    block_w = triton.next_power_of_2(width)
    _norm_kernel[(num_tokens,)](
        x, residual, weight, out, num_tokens, eps, x.stride(0), 0, residual.stride(0), out.stride(0), 0,
        HEADS=1, WIDTH=width, BLOCK_R=1, BLOCK_W=block_w, HAS_RESIDUAL=True,
        num_warps=_num_warps(block_w), **launch_options(x.device),
    )  # fmt: skip
    return out


def _num_warps(block_w: int) -> int:
    return min(16, max(4, block_w // 512))


def _check(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    require_launchable("x", x)
    require_like("x", x, tuple(x.shape), x)
    require_like("out", out, tuple(x.shape), x)
    require(weight.shape == x.shape[-1:], "weight", f"of shape ({x.shape[-1]},)")
    require(weight.device == x.device, "weight", f"on {x.device}")
    require(weight.is_contiguous(), "weight", "contiguous")
