"""The gated activation of the feed-forward block. Semantics: `kernels.reference.silu_and_mul`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.checks import require, require_launchable, require_like
from kernels.dependent_launch import launch_options, start_dependents, wait_for_dependencies

_BLOCK = 1024


@triton.jit
def _silu_and_mul_kernel(  # type: ignore[no-untyped-def]
    gate_up_ptr,
    out_ptr,
    gate_up_stride,
    out_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    start_dependents(IS_DEPENDENT)
    wait_for_dependencies(IS_DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    gate_ptrs = gate_up_ptr + token * gate_up_stride + columns
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + WIDTH, mask=mask, other=0.0).to(tl.float32)
    # Rounded between the two operations, as two separate ones would: the checkpoints' arithmetic.
    silu = (gate * tl.sigmoid(gate)).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + token * out_stride + columns, (silu * up).to(out_ptr.dtype.element_ty), mask=mask)


def silu_and_mul(gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """See `kernels.reference.silu_and_mul`. Raises ValueError naming an argument that is wrong."""
    require(out.dim() == 2, "out", "of shape (tokens, width)")
    require_launchable("gate_up", gate_up)
    num_tokens, width = out.shape
    require_like("gate_up", gate_up, (num_tokens, 2 * width), gate_up)
    require_like("out", out, (num_tokens, width), gate_up)
    if num_tokens == 0 or width == 0:
        return out
    _silu_and_mul_kernel[(num_tokens, triton.cdiv(width, _BLOCK))](
        gate_up, out, gate_up.stride(0), out.stride(0), WIDTH=width, BLOCK=_BLOCK, num_warps=4,
        **launch_options(out.device),
    )  # fmt: skip
    return out
