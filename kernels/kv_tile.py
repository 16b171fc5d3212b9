"""The tile of keys and values that both attention kernels walk over, and the softmax step on it.

A tile never leaves its row: the row is mapped whole, its neighbour may not be mapped at all. So tiles
are counted per row, and one that reaches past the row's T tokens is masked there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from triton import knobs

LOG2_E = 1.4426950408889634
_SCRATCH_BYTES = 2048  # shared memory left for reductions within a program
_RESERVED_BYTES = 1024  # of an SM's shared memory, for each program on it


@dataclass(frozen=True, slots=True)
class TileShape:
    """How a row of the pool is cut.

    Attributes:
        block_tokens: tokens of a tile, a power of two, at least 16 (the least `tl.dot` takes).
        block_dim: head_dim rounded up to a power of two, at least 16.
        is_even: whether tiles fill rows exactly, so that only a sequence's end needs a mask.
    """

    block_tokens: int
    block_dim: int
    is_even: bool


def tile_shape(
    tokens_per_row: int, head_dim: int, element_bytes: int, max_tokens: int, max_bytes: int
) -> TileShape:
    """The largest tiles within both limits (`max_tokens` is a power of two) for rows of that length."""
    block_dim = max(16, triton.next_power_of_2(head_dim))
    limit = max(16, min(max_tokens, max_bytes // (block_dim * element_bytes)))
    divisor = tokens_per_row & -tokens_per_row
    if divisor >= 16:
        return TileShape(min(limit, divisor), block_dim, True)
    return TileShape(max(16, min(limit, triton.next_power_of_2(tokens_per_row))), block_dim, False)


def fitting_stages(tile: TileShape, block_m: int, element_bytes: int, device: torch.device) -> int:
    """Tiles of K and V in flight, at most 3: as many as shared memory holds beside the queries."""
    line_bytes = tile.block_dim * element_bytes
    return stages_beside(block_m * line_bytes, 2 * tile.block_tokens * line_bytes, 3, device)


def sharing_stages(
    tile: TileShape, block_m: int, element_bytes: int, programs: int, device: torch.device
) -> int:
    """Stages with which `programs` programs fill an SM's shared memory, and one more finds no room.

    For kernels without asynchronous products, which keep a tile fewer in shared memory than stages.
    """
    line_bytes = tile.block_dim * element_bytes
    room = _room(programs, device) - block_m * line_bytes
    return max(1, 1 + room // (2 * tile.block_tokens * line_bytes))


def stages_beside(fixed_bytes: int, stage_bytes: int, most: int, device: torch.device) -> int:
    """Stages of `stage_bytes` that shared memory holds beside `fixed_bytes`; from 1 to `most`."""
    return max(1, min(most, (_room(1, device) - fixed_bytes) // stage_bytes))


def _room(programs: int, device: torch.device) -> int:
    """Bytes of shared memory for data in each of so many programs on an SM."""
    share = (_shared_bytes(device) + _RESERVED_BYTES) // programs - _RESERVED_BYTES
    return share - _SCRATCH_BYTES


@cache
def _shared_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0  # interpreted
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


def widens_operands(dtype: torch.dtype) -> bool:
    """Whether `tl.dot` must be given float32: Triton's interpreter multiplies bfloat16's bit patterns."""
    return dtype == torch.bfloat16 and bool(knobs.runtime.interpret)


@triton.jit
def count_tiles(num_tokens, TOKENS_PER_ROW: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tiles that hold a sequence's first `num_tokens` tokens."""
    tiles_per_row: tl.constexpr = (TOKENS_PER_ROW + BLOCK_N - 1) // BLOCK_N
    rest = num_tokens % TOKENS_PER_ROW
    return num_tokens // TOKENS_PER_ROW * tiles_per_row + (rest + BLOCK_N - 1) // BLOCK_N


@triton.jit
def attend_tile(  # type: ignore[no-untyped-def]
    acc,
    top,
    total,
    q,
    query_positions,
    k_base,
    shared_shift,
    shared_len,
    row_stride,
    value_stride,
    token_stride,
    tile,
    context_len,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    TOKENS_PER_ROW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_MASKED: tl.constexpr,
    MAY_SHARE: tl.constexpr,
    WIDENS: tl.constexpr,
):
    """One step of the online softmax, in base 2: takes and returns (acc, top, total).

    `k_base` points at the keys of one head in the sequence's first row; `row_stride` is int64.
    Tokens before `shared_len` lie `shared_shift` rows (int32) away from where those rows would be; without
    MAY_SHARE the tile must lie beyond them. Without IS_MASKED it must be full and visible to every query.
    """
    tiles_per_row: tl.constexpr = (TOKENS_PER_ROW + BLOCK_N - 1) // BLOCK_N
    row = tile // tiles_per_row
    offsets = tile % tiles_per_row * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    place = row
    if MAY_SHARE:
        # A shift of rows costs the loop of decodes one instruction (of 369 on sm_90), one of addresses ten.
        place += tl.where(row * TOKENS_PER_ROW < shared_len, shared_shift, 0)
    k_ptrs = k_base + place * row_stride + offsets[:, None] * token_stride + dims[None, :]
    v_ptrs = k_ptrs + value_stride
    positions = row * TOKENS_PER_ROW + offsets
    is_live = (offsets < TOKENS_PER_ROW) & (positions < context_len)
    if IS_MASKED:
        mask = is_live[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(k_ptrs, mask=mask, other=0.0)
        v = tl.load(v_ptrs, mask=mask, other=0.0)
    elif HEAD_DIM == BLOCK_D:
        k = tl.load(k_ptrs)
        v = tl.load(v_ptrs)
    else:
        k = tl.load(k_ptrs, mask=(dims < HEAD_DIM)[None, :], other=0.0)
        v = tl.load(v_ptrs, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    if WIDENS:
        q = q.to(tl.float32)
        k = k.to(tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    if IS_MASKED:
        is_visible = is_live[None, :] & (positions[None, :] <= query_positions[:, None])
        scores = tl.where(is_visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    weights = weights.to(v.dtype)
    if WIDENS:
        weights = weights.to(tl.float32)
        v = v.to(tl.float32)
    acc = tl.dot(weights, v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_top, total
