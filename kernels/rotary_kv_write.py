"""Between the projection and attention: norm, rotate and store what a step computed, in one pass.

Queries are turned where they lie; keys are turned on their way into the pool, beside the values, and
their own buffer is only read. Semantics: `kernels.reference.rotary_and_kv_write`.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from kernels.checks import require, require_index, require_launchable, require_like, require_pool
from kernels.dependent_launch import launch_options, start_dependents, wait_for_dependencies

_BLOCK_ELEMENTS = 1024  # H100, 32/8 heads of 128: 8192 tokens 75 us (2.7 TB/s), 256 tokens 2.3, one 1.4


@triton.jit
def _turn(  # type: ignore[no-untyped-def]
    x_ptrs, mask, norm_ptr, eps, c, s, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, IS_NORMED: tl.constexpr
):
    """Both halves of some heads, normed and rotated, in the type of `x_ptrs`: (heads, BLOCK_HALF) each."""
    dtype: tl.constexpr = x_ptrs.dtype.element_ty
    low = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(x_ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
    if IS_NORMED:
        dims = tl.arange(0, BLOCK_HALF)
        low_weight = tl.load(norm_ptr + dims, mask=dims < HALF, other=0.0).to(tl.float32)[None, :]
        high_weight = tl.load(norm_ptr + HALF + dims, mask=dims < HALF, other=0.0).to(tl.float32)[None, :]
        scale = tl.rsqrt(tl.sum(low * low + high * high, 1) / (2 * HALF) + eps)[:, None]
        # Rounded before the weight and after it, as a norm of its own would be.
        low = ((low * scale).to(dtype).to(tl.float32) * low_weight).to(dtype).to(tl.float32)
        high = ((high * scale).to(dtype).to(tl.float32) * high_weight).to(dtype).to(tl.float32)
    return (low * c - high * s).to(dtype), (high * c + low * s).to(dtype)


@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "first_rows_ptr"])
def _rotary_kv_write_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    kv_ptr,
    first_rows_ptr,
    q_norm_ptr,
    k_norm_ptr,
    eps,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    kv_row_stride,
    kv_value_stride,
    kv_token_stride,
    kv_head_stride,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS_PER_ROW: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    NORMS_Q: tl.constexpr,
    NORMS_K: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    start_dependents(IS_DEPENDENT)
    wait_for_dependencies(IS_DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    query_blocks: tl.constexpr = (QUERY_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    position = tl.load(positions_ptr + token)
    dims = tl.arange(0, BLOCK_HALF)[None, :]
    c = tl.load(cos_ptr + position * HALF + dims, mask=dims < HALF, other=0.0)
    s = tl.load(sin_ptr + position * HALF + dims, mask=dims < HALF, other=0.0)
    if block < query_blocks:
        heads = block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
        mask = (heads < QUERY_HEADS) & (dims < HALF)
        q_ptrs = q_ptr + token * q_token_stride + heads * q_head_stride + dims
        low, high = _turn(q_ptrs, mask, q_norm_ptr, eps, c, s, HALF, BLOCK_HALF, NORMS_Q)
        tl.store(q_ptrs, low, mask=mask)
        tl.store(q_ptrs + HALF, high, mask=mask)
    else:
        heads = (block - query_blocks) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
        mask = (heads < KV_HEADS) & (dims < HALF)
        k_ptrs = k_ptr + token * k_token_stride + heads * k_head_stride + dims
        v_ptrs = v_ptr + token * v_token_stride + heads * v_head_stride + dims
        value_low = tl.load(v_ptrs, mask=mask)
        value_high = tl.load(v_ptrs + HALF, mask=mask)
        low, high = _turn(k_ptrs, mask, k_norm_ptr, eps, c, s, HALF, BLOCK_HALF, NORMS_K)
        row = tl.load(first_rows_ptr + token) + position // TOKENS_PER_ROW
        place = row * kv_row_stride + position % TOKENS_PER_ROW * kv_token_stride
        to = kv_ptr + place + heads * kv_head_stride + dims
        tl.store(to, low, mask=mask)
        tl.store(to + HALF, high, mask=mask)
        tl.store(to + kv_value_stride, value_low, mask=mask)
        tl.store(to + kv_value_stride + HALF, value_high, mask=mask)


def rotary_and_kv_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    kv: torch.Tensor,
    first_rows: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
) -> None:
    """See `kernels.reference.rotary_and_kv_write`. Raises ValueError naming an argument that is wrong."""
    _check(q, k, v, cos, sin, positions, kv, first_rows)
    _check_norm("q_norm", q_norm, q)
    _check_norm("k_norm", k_norm, q)
    num_tokens, query_heads, head_dim = q.shape
    tokens_per_row, kv_heads = kv.shape[2:4]
    if num_tokens == 0:
        return
    block_heads, block_half = _block(query_heads, head_dim)
    blocks = -(-query_heads // block_heads) + -(-kv_heads // block_heads)
    _rotary_kv_write_kernel[(num_tokens, blocks)](
        q, k, v, cos, sin, positions, kv, first_rows,
        cos if q_norm is None else q_norm, cos if k_norm is None else k_norm, eps,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        kv.stride(0), kv.stride(1), kv.stride(2), kv.stride(3),
        QUERY_HEADS=query_heads, KV_HEADS=kv_heads, HALF=head_dim // 2, TOKENS_PER_ROW=tokens_per_row,
        BLOCK_HEADS=block_heads, BLOCK_HALF=block_half,
        NORMS_Q=q_norm is not None, NORMS_K=k_norm is not None, num_warps=4,
        **launch_options(q.device),
    )  # fmt: skip


@cache
def _block(query_heads: int, head_dim: int) -> tuple[int, int]:
    """Heads of a program, and half a head, as powers of two."""
    block_half = triton.next_power_of_2(head_dim // 2)
    most = max(1, _BLOCK_ELEMENTS // (2 * block_half))
    return min(most, triton.next_power_of_2(query_heads)), block_half


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    kv: torch.Tensor,
    first_rows: torch.Tensor,
) -> None:
    require(q.dim() == 3 and q.shape[-1] % 2 == 0, "q", "of shape (tokens, query_heads, an even head_dim)")
    require_launchable("q", q)
    require_like("q", q, tuple(q.shape), q)
    require_pool(kv, q)
    num_tokens, head_dim = q.shape[0], q.shape[2]
    require(kv.shape[4] == head_dim, "kv", f"of head_dim {head_dim}, as q is")
    keys_shape = (num_tokens, kv.shape[3], head_dim)
    require_like("k", k, keys_shape, q)
    require_like("v", v, keys_shape, q)
    half = head_dim // 2
    for name, table in (("cos", cos), ("sin", sin)):
        require(table.dtype == torch.float32, name, "float32")
        require(table.device == q.device, name, f"on {q.device}")
        require(table.dim() == 2 and table.shape[1] == half, name, f"of shape (max positions, {half})")
        require(table.is_contiguous(), name, "contiguous")
    require_index("positions", positions, num_tokens, torch.int64, q)
    require_index("first_rows", first_rows, num_tokens, torch.int64, q)


def _check_norm(name: str, norm: torch.Tensor | None, q: torch.Tensor) -> None:
    if norm is None:
        return
    require(norm.shape == q.shape[2:], name, f"of shape ({q.shape[2]},), or None")
    require(norm.device == q.device, name, f"on {q.device}")
    require(norm.is_contiguous(), name, "contiguous")
