"""Scatter new keys and values into the pool: a program a token. Semantics: `kernels.reference.kv_write`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.checks import require, require_index, require_launchable, require_like, require_pool


@triton.jit(do_not_specialize_on_alignment=["first_rows_ptr", "positions_ptr"])
def _kv_write_kernel(  # type: ignore[no-untyped-def]
    kv_ptr,
    k_ptr,
    v_ptr,
    first_rows_ptr,
    positions_ptr,
    kv_row_stride,
    kv_value_stride,
    kv_token_stride,
    kv_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TOKENS_PER_ROW: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token)
    row = tl.load(first_rows_ptr + token) + position // TOKENS_PER_ROW
    offset = position % TOKENS_PER_ROW
    heads = tl.arange(0, BLOCK_H)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    mask = (heads < KV_HEADS) & (dims < HEAD_DIM)
    k = tl.load(k_ptr + token * k_token_stride + heads * k_head_stride + dims, mask=mask)
    v = tl.load(v_ptr + token * v_token_stride + heads * v_head_stride + dims, mask=mask)
    to = kv_ptr + row * kv_row_stride + offset * kv_token_stride + heads * kv_head_stride + dims
    tl.store(to, k, mask=mask)
    tl.store(to + kv_value_stride, v, mask=mask)


def kv_write(
    kv: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first_rows: torch.Tensor, positions: torch.Tensor
) -> None:
    """See `kernels.reference.kv_write`. Raises ValueError naming an argument that is wrong."""
    require(k.dim() == 3, "k", "of shape (tokens, kv_heads, head_dim)")
    require_launchable("k", k)
    require_pool(kv, kv)
    num_tokens, (tokens_per_row, kv_heads, head_dim) = k.shape[0], kv.shape[2:]
    require_like("k", k, (num_tokens, kv_heads, head_dim), kv)
    require_like("v", v, (num_tokens, kv_heads, head_dim), kv)
    require_index("first_rows", first_rows, num_tokens, torch.int64, kv)
    require_index("positions", positions, num_tokens, torch.int64, kv)
    if num_tokens == 0:
        return
    _kv_write_kernel[(num_tokens,)](
        kv, k, v, first_rows, positions,
        kv.stride(0), kv.stride(1), kv.stride(2), kv.stride(3),
        k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        KV_HEADS=kv_heads, HEAD_DIM=head_dim, TOKENS_PER_ROW=tokens_per_row,
        BLOCK_H=triton.next_power_of_2(kv_heads), BLOCK_D=triton.next_power_of_2(head_dim),
        num_warps=4,
    )  # fmt: skip
