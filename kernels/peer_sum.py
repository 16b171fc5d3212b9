"""The sum over the ranks of a TP group, the residual's addition and the norm after it, in one kernel.

A GPU reads the other ranks' parts where they lie, over NVLink (or PCIe, where GPUs may): one trip, where a
library's sum makes several, and a norm is a kernel of its own. What crosses the link is size - 1 parts for a
rank, with more than two ranks more than in a ring, so it is for the few rows of decodes.

A program waits for the others' programs of the same row, which tell it by a number in its GPU's memory that
grows by one with each sum. Nothing tells that a part has been read. So memory that a sum has read may be
written again only after another sum has ended: no rank begins a sum before its last one has ended.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels.checks import require, require_launchable, require_like
from kernels.dependent_launch import launch_options, start_dependents, wait_for_dependencies


@dataclass(frozen=True, slots=True)
class PeerParts:
    """Memory of all ranks for the parts of one sum, as one rank sees it.

    Attributes:
        part: (rows or more, width), this rank's own.
        addresses: (size,) int64, where each rank's part begins. All have one shape.
        flags: (size,) int64, where each rank's (rows, size) int32 flags begin, at first equal to `epochs`.
        epochs: (rows,) int32, sums this rank has made of each row. They wrap around.
        rank, size: whose view this is, and of how many.
    """

    part: torch.Tensor
    addresses: torch.Tensor
    flags: torch.Tensor
    epochs: torch.Tensor
    rank: int
    size: int


@triton.jit
def _sum_norm_kernel(  # type: ignore[no-untyped-def]
    parts_ptr,
    flags_ptr,
    epochs_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    eps,
    part_stride,
    residual_stride,
    out_stride,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    start_dependents(IS_DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_W)
    mask = columns < WIDTH
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    own_flags = tl.load(flags_ptr + RANK).to(tl.pointer_type(tl.int32)) + row * SIZE
    wait_for_dependencies(IS_DEPENDENT)
    epoch = tl.load(epochs_ptr + row) + 1
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            theirs = tl.load(flags_ptr + peer).to(tl.pointer_type(tl.int32)) + row * SIZE + RANK
            tl.atomic_xchg(theirs, epoch, sem="release", scope="sys")
    tl.store(epochs_ptr + row, epoch)
    residual_ptrs = residual_ptr + row * residual_stride + columns
    x = tl.zeros([BLOCK_W], dtype=tl.float32)
    if HAS_RESIDUAL:
        x = tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            while tl.atomic_add(own_flags + peer, 0, sem="acquire", scope="sys") - epoch < 0:
                pass
    total = tl.zeros([BLOCK_W], dtype=tl.float32)
    for peer in tl.static_range(SIZE):  # in the order of ranks: all of them get the same bits
        part_ptr = tl.load(parts_ptr + peer).to(tl.pointer_type(out_ptr.dtype.element_ty))
        part_ptrs = part_ptr + row * part_stride + columns
        total += tl.load(part_ptrs, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    rounded = (x + total).to(residual_ptr.dtype.element_ty)
    tl.store(residual_ptrs, rounded, mask=mask)
    x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    # Rounded before the weight, as the checkpoints' own training code does.
    normed = (x * scale).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * out_stride + columns, (normed * weight).to(out_ptr.dtype.element_ty), mask=mask)


def sum_add_rms_norm(
    parts: PeerParts,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    has_residual: bool = True,
) -> torch.Tensor:
    """Sum the first rows of all ranks' parts, add the sum to the residual, and norm that into `out`.

    All ranks call it for the same rows, in the same order of calls.

    Args:
        parts: written by the kernels before on each rank's stream.
        residual: (rows, width), replaced by its sum with the parts.
        weight: (width,) of the norm.
        out: (rows, width).
        has_residual: False replaces `residual` by the sum of the parts alone.

    Raises:
        ValueError: naming an argument that is wrong.
    """
    require_launchable("residual", residual)
    require(residual.dim() == 2, "residual", "of shape (rows, width)")
    rows, width = residual.shape
    require_like("out", out, (rows, width), residual)
    require_like("part", parts.part[:rows], (rows, width), residual)
    require(weight.shape == (width,) and weight.is_contiguous(), "weight", f"of shape ({width},)")
    require(parts.epochs.shape[0] >= rows, "parts", f"for {rows} rows")
    if rows == 0:
        return out
    block_w = triton.next_power_of_2(width)
    _sum_norm_kernel[(rows,)](
        parts.addresses, parts.flags, parts.epochs, residual, weight, out, eps,
        parts.part.stride(0), residual.stride(0), out.stride(0),
        RANK=parts.rank, SIZE=parts.size, WIDTH=width, BLOCK_W=block_w, HAS_RESIDUAL=has_residual,
        num_warps=min(16, max(4, block_w // 512)), **launch_options(residual.device),
    )  # fmt: skip
    return out
