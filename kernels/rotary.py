"""Rotary position embedding, in place: a program a token. Semantics: `kernels.reference.rotary`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.checks import require, require_index, require_launchable, require_like


@triton.jit
def _rotate_heads(  # type: ignore[no-untyped-def]
    x_ptr, head_stride, c, s, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    heads = tl.arange(0, BLOCK_HEADS)[:, None]
    dims = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (heads < HEADS) & (dims < HALF)
    low_ptrs = x_ptr + heads * head_stride + dims
    low = tl.load(low_ptrs, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(low_ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(low_ptrs, (low * c - high * s).to(x_ptr.dtype.element_ty), mask=mask)
    tl.store(low_ptrs + HALF, (high * c + low * s).to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["positions_ptr"])
def _rotary_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_QUERY_HEADS: tl.constexpr,
    BLOCK_KV_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    angle = tl.load(positions_ptr + token) * HALF + tl.arange(0, BLOCK_HALF)
    mask = tl.arange(0, BLOCK_HALF) < HALF
    c = tl.load(cos_ptr + angle, mask=mask, other=0.0)[None, :]
    s = tl.load(sin_ptr + angle, mask=mask, other=0.0)[None, :]
    _rotate_heads(
        q_ptr + token * q_token_stride, q_head_stride, c, s, QUERY_HEADS, HALF, BLOCK_QUERY_HEADS, BLOCK_HALF
    )
    _rotate_heads(
        k_ptr + token * k_token_stride, k_head_stride, c, s, KV_HEADS, HALF, BLOCK_KV_HEADS, BLOCK_HALF
    )


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> None:
    """See `kernels.reference.rotary`. Raises ValueError naming an argument that is wrong."""
    require(q.dim() == 3 and q.shape[-1] % 2 == 0, "q", "of shape (tokens, query_heads, an even head_dim)")
    require(k.dim() == 3, "k", "of shape (tokens, kv_heads, head_dim)")
    require_launchable("q", q)
    num_tokens, query_heads, head_dim = q.shape
    require_like("q", q, tuple(q.shape), q)
    require_like("k", k, (num_tokens, k.shape[1], head_dim), q)
    half = head_dim // 2
    for name, table in (("cos", cos), ("sin", sin)):
        require(table.dtype == torch.float32, name, "float32")
        require(table.device == q.device, name, f"on {q.device}")
        require(table.dim() == 2 and table.shape[1] == half, name, f"of shape (max positions, {half})")
        require(table.is_contiguous(), name, "contiguous")
    require_index("positions", positions, num_tokens, torch.int64, q)
    if num_tokens == 0:
        return
    _rotary_kernel[(num_tokens,)](
        q, k, cos, sin, positions, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        QUERY_HEADS=query_heads, KV_HEADS=k.shape[1], HALF=half,
        BLOCK_QUERY_HEADS=triton.next_power_of_2(query_heads),
        BLOCK_KV_HEADS=triton.next_power_of_2(k.shape[1]), BLOCK_HALF=triton.next_power_of_2(half),
        num_warps=4,
    )  # fmt: skip
