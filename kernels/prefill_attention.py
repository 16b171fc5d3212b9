"""Causal attention of new tokens over paged-free KV: many sequences of any length in one launch.

On Hopper GPUs, for the inputs that `kernels.prefill_hopper` names, its kernel serves; here is that choice
and the kernel for everything else, in plain Triton.

A tile's rows are (token, query head of the group) pairs, so that one read of K and V serves the whole
group and group sizes need not be powers of two. Semantics: `kernels.reference.prefill_attention`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.checks import require, require_index, require_launchable, require_like, require_pool
from kernels.kv_tile import LOG2_E, attend_tile, count_tiles, fitting_stages, tile_shape, widens_operands
from kernels.prefill_hopper import hopper_pool, prefill_attention_hopper

# Of the portable kernel. H100, Llama-3.1-8B's heads, 16k tokens: 128 x 128 tiles in three stages by eight
# warps 527 TFLOP/s, 128 x 64 484; four warps and two stages 429.
_TILE_BYTES = 32 * 1024
_WIDE_TILE_BYTES = 16 * 1024  # float32 products run on registers, which larger tiles would spill


@triton.jit(
    do_not_specialize_on_alignment=[
        "query_starts_ptr",
        "first_rows_ptr",
        "shared_first_rows_ptr",
        "shared_lens_ptr",
        "context_lens_ptr",
    ]
)
def _prefill_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    kv_ptr,
    out_ptr,
    query_starts_ptr,
    first_rows_ptr,
    shared_first_rows_ptr,
    shared_lens_ptr,
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
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TOKENS_PER_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_EVEN: tl.constexpr,
    WIDENS: tl.constexpr,
):
    # The last queries see the most keys: started first, they do not trail behind the rest.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = tl.program_id(2)
    query_start = tl.load(query_starts_ptr + sequence)
    num_queries = tl.load(query_starts_ptr + sequence + 1) - query_start
    first_pair = block * BLOCK_M
    if first_pair >= num_queries * GROUP:
        return
    context_len = tl.load(context_lens_ptr + sequence)
    first_row = tl.load(first_rows_ptr + sequence)
    shared_len = tl.load(shared_lens_ptr + sequence)
    shared_shift = (tl.load(shared_first_rows_ptr + sequence) - first_row).to(tl.int32)
    num_cached = context_len - num_queries

    pairs = first_pair + tl.arange(0, BLOCK_M)
    tokens = pairs // GROUP
    heads = kv_head * GROUP + pairs % GROUP
    dims = tl.arange(0, BLOCK_D)
    mask = (tokens < num_queries)[:, None] & (dims < HEAD_DIM)[None, :]
    q_rows = (query_start + tokens).to(tl.int64)
    q_ptrs = q_ptr + (q_rows * q_token_stride + heads * q_head_stride)[:, None] + dims[None, :]
    q = tl.load(q_ptrs, mask=mask, other=0.0)

    row_stride = kv_row_stride.to(tl.int64)
    k_base = kv_ptr + first_row * row_stride + kv_head * kv_head_stride
    last_token = tl.minimum((first_pair + BLOCK_M - 1) // GROUP, num_queries - 1)
    num_tiles = count_tiles(num_cached + last_token + 1, TOKENS_PER_ROW, BLOCK_N)
    # Tiles that end at or before the block's first query are seen whole by all of it: the shared ones too,
    # so that where tiles fill rows only the first loop meets those.
    num_full = (num_cached + first_pair // GROUP + 1) // BLOCK_N if IS_EVEN else 0

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    positions = num_cached + tokens
    for tile in range(0, num_full):
        acc, top, total = attend_tile(
            acc, top, total, q, positions, k_base, shared_shift, shared_len, row_stride, kv_value_stride,
            kv_token_stride, tile, context_len, scale_log2,
            HEAD_DIM, TOKENS_PER_ROW, BLOCK_N, BLOCK_D, False, True, WIDENS,
        )  # fmt: skip
    for tile in range(num_full, num_tiles):
        acc, top, total = attend_tile(
            acc, top, total, q, positions, k_base, shared_shift, shared_len, row_stride, kv_value_stride,
            kv_token_stride, tile, context_len, scale_log2,
            HEAD_DIM, TOKENS_PER_ROW, BLOCK_N, BLOCK_D, True, not IS_EVEN, WIDENS,
        )  # fmt: skip

    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    out_ptrs = out_ptr + (q_rows * out_token_stride + heads * out_head_stride)[:, None] + dims[None, :]
    tl.store(out_ptrs, out, mask=mask)


def prefill_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    query_starts: torch.Tensor,
    first_rows: torch.Tensor,
    shared_first_rows: torch.Tensor,
    shared_lens: torch.Tensor,
    context_lens: torch.Tensor,
    max_query_len: int,
    scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """See `kernels.reference.prefill_attention`. Raises ValueError naming an argument that is wrong."""
    _check(q, kv, query_starts, first_rows, shared_first_rows, shared_lens, context_lens, max_query_len, out)
    if q.shape[0] == 0 or first_rows.numel() == 0:
        return out
    pool = hopper_pool(q, kv, out)
    if pool is None:
        _prefill_portable(
            q, kv, query_starts, first_rows, shared_first_rows, shared_lens, context_lens, max_query_len,
            scale, out,
        )  # fmt: skip
    else:
        prefill_attention_hopper(
            pool, q, query_starts, first_rows, shared_first_rows, shared_lens, context_lens, scale, out
        )
    return out


def _prefill_portable(
    q: torch.Tensor,
    kv: torch.Tensor,
    query_starts: torch.Tensor,
    first_rows: torch.Tensor,
    shared_first_rows: torch.Tensor,
    shared_lens: torch.Tensor,
    context_lens: torch.Tensor,
    max_query_len: int,
    scale: float,
    out: torch.Tensor,
) -> None:
    query_heads, head_dim = q.shape[1:]
    tokens_per_row, kv_heads = kv.shape[2:4]
    group = query_heads // kv_heads
    is_wide = q.element_size() > 2
    tile = tile_shape(
        tokens_per_row, head_dim, q.element_size(), 128, _WIDE_TILE_BYTES if is_wide else _TILE_BYTES
    )
    block_m = _block_m(tile.block_dim, is_wide)
    grid = (triton.cdiv(max_query_len * group, block_m), kv_heads, first_rows.numel())
    _prefill_kernel[grid](
        q, kv, out, query_starts, first_rows, shared_first_rows, shared_lens, context_lens, scale * LOG2_E,
        q.stride(0), q.stride(1), kv.stride(0), kv.stride(1), kv.stride(2), kv.stride(3),
        out.stride(0), out.stride(1),
        GROUP=group, HEAD_DIM=head_dim, TOKENS_PER_ROW=tokens_per_row, BLOCK_M=block_m,
        BLOCK_N=tile.block_tokens, BLOCK_D=tile.block_dim, IS_EVEN=tile.is_even,
        WIDENS=widens_operands(q.dtype), num_warps=8,
        num_stages=fitting_stages(tile, block_m, q.element_size(), q.device),
    )  # fmt: skip


def _block_m(block_dim: int, is_wide: bool) -> int:
    """Rows of a tile of queries: as many as the float32 accumulator's registers allow."""
    if is_wide:
        return 32
    return 128 if block_dim <= 128 else 64


def _check(
    q: torch.Tensor,
    kv: torch.Tensor,
    query_starts: torch.Tensor,
    first_rows: torch.Tensor,
    shared_first_rows: torch.Tensor,
    shared_lens: torch.Tensor,
    context_lens: torch.Tensor,
    max_query_len: int,
    out: torch.Tensor,
) -> None:
    require(q.dim() == 3, "q", "of shape (tokens, query_heads, head_dim)")
    require_launchable("q", q)
    require_like("q", q, tuple(q.shape), q)
    require_pool(kv, q)
    require(kv.shape[4] == q.shape[2], "kv", f"of head_dim {q.shape[2]}, as q is")
    require(q.shape[1] % kv.shape[3] == 0, "q", f"of heads that are a multiple of {kv.shape[3]}, as kv's")
    require_like("out", out, tuple(q.shape), q)
    num_sequences = first_rows.numel()
    require_index("first_rows", first_rows, num_sequences, torch.int64, q)
    require_index("shared_first_rows", shared_first_rows, num_sequences, torch.int64, q)
    require_index("shared_lens", shared_lens, num_sequences, torch.int32, q)
    require_index("context_lens", context_lens, num_sequences, torch.int32, q)
    require_index("query_starts", query_starts, num_sequences + 1, torch.int32, q)
    require(max_query_len >= 1 or q.shape[0] == 0, "max_query_len", "at least 1")
