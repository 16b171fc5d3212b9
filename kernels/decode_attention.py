"""Attention of one new token a sequence: split over the KV, then reduced.

The query heads of a group share one tile, so K and V are read once. A long context is split over
several programs, whose partial results a second kernel joins; how many is a plain argument, so that
nothing is compiled anew when batch or context grow. Semantics: `kernels.reference.decode_attention`.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from kernels.checks import require, require_index, require_launchable, require_like, require_pool
from kernels.kv_tile import LOG2_E, attend_tile, count_tiles, fitting_stages, tile_shape, widens_operands

_TILE_BYTES = 16 * 1024  # three stages of K and V are 96 KiB: two programs share an SM
_MIN_SPLIT_TOKENS = 256  # below it, joining costs more than the parallel reads gain
_MAX_SPLIT_TOKENS = 4096  # above it, one long sequence of a large batch outlasts the others
_PROGRAMS_PER_SM = 4
_MAX_PROGRAMS = 16384  # bounds the partial results: 32 MiB at four heads a group of 128


@triton.jit(
    do_not_specialize=["num_splits"],
    do_not_specialize_on_alignment=["first_rows_ptr", "context_lens_ptr"],
)
def _decode_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    kv_ptr,
    out_ptr,
    partial_ptr,
    stats_ptr,
    first_rows_ptr,
    context_lens_ptr,
    scale_log2,
    q_token_stride,
    q_head_stride,
    kv_row_stride,
    kv_value_stride,
    kv_token_stride,
    kv_head_stride,
    out_token_stride,
    out_head_stride,
    num_splits,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TOKENS_PER_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MIN_TILES: tl.constexpr,
    IS_EVEN: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    WIDENS: tl.constexpr,
):
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    context_len = tl.load(context_lens_ptr + sequence)
    num_tiles = count_tiles(context_len, TOKENS_PER_ROW, BLOCK_N)
    tiles_per_split = tl.maximum((num_tiles + num_splits - 1) // num_splits, MIN_TILES)
    begin = split * tiles_per_split
    if begin >= num_tiles:
        return
    end = tl.minimum(begin + tiles_per_split, num_tiles)
    num_full = context_len // BLOCK_N if IS_EVEN else 0
    full_end = tl.maximum(begin, tl.minimum(end, num_full))

    members = tl.arange(0, BLOCK_M)
    heads = kv_head * GROUP + members
    dims = tl.arange(0, BLOCK_D)
    mask = (members < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    q_ptrs = q_ptr + sequence * q_token_stride + (heads * q_head_stride)[:, None] + dims[None, :]
    q = tl.load(q_ptrs, mask=mask, other=0.0)
    row_stride = kv_row_stride.to(tl.int64)
    k_base = kv_ptr + tl.load(first_rows_ptr + sequence) * row_stride + kv_head * kv_head_stride

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    positions = context_len - 1 + tl.zeros([BLOCK_M], dtype=tl.int32)
    for tile in range(begin, full_end):
        acc, top, total = attend_tile(
            acc, top, total, q, positions, k_base, row_stride, kv_value_stride, kv_token_stride, tile,
            context_len, scale_log2, HEAD_DIM, TOKENS_PER_ROW, BLOCK_N, BLOCK_D, False, WIDENS,
        )  # fmt: skip
    for tile in range(full_end, end):
        acc, top, total = attend_tile(
            acc, top, total, q, positions, k_base, row_stride, kv_value_stride, kv_token_stride, tile,
            context_len, scale_log2, HEAD_DIM, TOKENS_PER_ROW, BLOCK_N, BLOCK_D, True, WIDENS,
        )  # fmt: skip

    if IS_SPLIT:
        num_heads = tl.num_programs(0) * GROUP
        parts = (sequence * num_heads + heads) * num_splits + split
        tl.store(partial_ptr + (parts * HEAD_DIM)[:, None] + dims[None, :], acc, mask=mask)
        tl.store(stats_ptr + parts * 2, top, mask=members < GROUP)
        tl.store(stats_ptr + parts * 2 + 1, total, mask=members < GROUP)
    else:
        out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
        out_ptrs = out_ptr + sequence * out_token_stride + (heads * out_head_stride)[:, None] + dims[None, :]
        tl.store(out_ptrs, out, mask=mask)


@triton.jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=["context_lens_ptr"])
def _reduce_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    partial_ptr,
    stats_ptr,
    context_lens_ptr,
    out_token_stride,
    out_head_stride,
    num_splits,
    HEAD_DIM: tl.constexpr,
    TOKENS_PER_ROW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    MIN_TILES: tl.constexpr,
):
    head = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    num_tiles = count_tiles(tl.load(context_lens_ptr + sequence), TOKENS_PER_ROW, BLOCK_N)
    tiles_per_split = tl.maximum((num_tiles + num_splits - 1) // num_splits, MIN_TILES)
    num_written = (num_tiles + tiles_per_split - 1) // tiles_per_split
    first_part = (sequence * tl.num_programs(0) + head) * num_splits

    dims = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    top = float("-inf")
    total = 0.0
    for first in range(0, num_written, BLOCK_SPLITS):
        splits = first + tl.arange(0, BLOCK_SPLITS)
        is_written = splits < num_written
        parts = first_part + splits
        tops = tl.load(stats_ptr + parts * 2, mask=is_written, other=float("-inf"))
        totals = tl.load(stats_ptr + parts * 2 + 1, mask=is_written, other=0.0)
        part_ptrs = partial_ptr + (parts * HEAD_DIM)[:, None] + dims[None, :]
        mask = is_written[:, None] & (dims < HEAD_DIM)[None, :]
        partial = tl.load(part_ptrs, mask=mask, other=0.0)
        new_top = tl.maximum(top, tl.max(tops, 0))
        shrink = tl.exp2(top - new_top)
        weights = tl.exp2(tops - new_top)
        acc = acc * shrink + tl.sum(partial * weights[:, None], 0)
        total = total * shrink + tl.sum(totals * weights, 0)
        top = new_top
    out_ptrs = out_ptr + sequence * out_token_stride + head * out_head_stride + dims
    tl.store(out_ptrs, (acc / total).to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


def decode_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    first_rows: torch.Tensor,
    context_lens: torch.Tensor,
    max_context_len: int,
    scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """See `kernels.reference.decode_attention`. Raises ValueError naming an argument that is wrong.

    Between kernels it holds (head_dim + 2) float32 a query head and split, 33 MiB at most for four
    query heads of 128 a KV head.
    """
    _check(q, kv, first_rows, context_lens, max_context_len, out)
    batch, query_heads, head_dim = q.shape
    tokens_per_row, kv_heads = kv.shape[2:4]
    if batch == 0:
        return out
    group = query_heads // kv_heads
    tile = tile_shape(tokens_per_row, head_dim, q.element_size(), 64, _TILE_BYTES)
    min_tiles = max(1, _MIN_SPLIT_TOKENS // tile.block_tokens)
    block_m = max(16, triton.next_power_of_2(group))
    num_splits = plan_splits(batch * kv_heads, max_context_len, _num_sms(q.device))
    is_split = num_splits > 1
    partial = torch.empty(
        (batch * query_heads * num_splits, head_dim) if is_split else (0, head_dim),
        dtype=torch.float32, device=q.device,
    )  # fmt: skip
    stats = torch.empty((partial.shape[0], 2), dtype=torch.float32, device=q.device)
    _decode_kernel[(kv_heads, num_splits, batch)](
        q, kv, out, partial, stats, first_rows, context_lens, scale * LOG2_E,
        q.stride(0), q.stride(1), kv.stride(0), kv.stride(1), kv.stride(2), kv.stride(3),
        out.stride(0), out.stride(1), num_splits,
        GROUP=group, HEAD_DIM=head_dim, TOKENS_PER_ROW=tokens_per_row,
        BLOCK_M=block_m, BLOCK_N=tile.block_tokens,
        BLOCK_D=tile.block_dim, MIN_TILES=min_tiles, IS_EVEN=tile.is_even, IS_SPLIT=is_split,
        WIDENS=widens_operands(q.dtype), num_warps=4,
        num_stages=fitting_stages(tile, block_m, q.element_size(), q.device),
    )  # fmt: skip
    if is_split:
        _reduce_kernel[(query_heads, batch)](
            out, partial, stats, context_lens, out.stride(0), out.stride(1), num_splits,
            HEAD_DIM=head_dim, TOKENS_PER_ROW=tokens_per_row, BLOCK_N=tile.block_tokens,
            BLOCK_D=tile.block_dim, BLOCK_SPLITS=16, MIN_TILES=min_tiles, num_warps=4,
        )  # fmt: skip
    return out


def plan_splits(num_heads: int, max_context_len: int, num_sms: int) -> int:
    """Parts to cut the longest context into, for `num_heads` KV heads over the whole batch.

    Enough to fill the GPU, and to keep a part short when one context is long; shorter contexts use
    fewer of them. Depends on no value that lives on the GPU.
    """
    to_fill = -(-_PROGRAMS_PER_SM * num_sms // num_heads)
    to_balance = -(-max_context_len // _MAX_SPLIT_TOKENS)
    useful = max_context_len // _MIN_SPLIT_TOKENS
    return max(1, min(max(to_fill, to_balance), useful, _MAX_PROGRAMS // num_heads))


@cache
def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return 32  # interpreted: a small GPU's, so that contexts are split there too
    return torch.cuda.get_device_properties(device).multi_processor_count


def _check(
    q: torch.Tensor,
    kv: torch.Tensor,
    first_rows: torch.Tensor,
    context_lens: torch.Tensor,
    max_context_len: int,
    out: torch.Tensor,
) -> None:
    require(q.dim() == 3, "q", "of shape (sequences, query_heads, head_dim)")
    require_launchable("q", q)
    require_like("q", q, tuple(q.shape), q)
    require_pool(kv, q)
    require(kv.shape[4] == q.shape[2], "kv", f"of head_dim {q.shape[2]}, as q is")
    require(q.shape[1] % kv.shape[3] == 0, "q", f"of heads that are a multiple of {kv.shape[3]}, as kv's")
    require_like("out", out, tuple(q.shape), q)
    require_index("first_rows", first_rows, q.shape[0], torch.int64, q)
    require_index("context_lens", context_lens, q.shape[0], torch.int32, q)
    require(max_context_len >= 1, "max_context_len", "at least 1")
