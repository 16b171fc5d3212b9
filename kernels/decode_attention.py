"""Attention of one new token a sequence, its work divided on the device and evenly.

The KV tiles of all sequences, one sequence after another, are cut into equal spans; a team of programs,
one a KV head, walks each. Lengths decide where spans begin, so that a CUDA graph captured once serves
every later step, and one long sequence among short ones keeps no program waiting. A sequence that lies in
several spans leaves partial results in the workspace, which a second kernel joins: a program that
waited for the others' parts and joined them itself took longer.

The query heads of a group share one tile, so K and V are read once. The KV heads of a token lie side
by side in the pool and are read at the same time, by the programs of a team.
Semantics: `kernels.reference`. Planning is `kernels.decode_plan`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from kernels.checks import require, require_index, require_launchable, require_like, require_pool
from kernels.decode_plan import PROGRAMS_PER_SM, divide, require_workspace
from kernels.dependent_launch import launch_options, start_dependents, wait_for_dependencies
from kernels.kv_tile import (
    LOG2_E,
    TileShape,
    attend_tile,
    count_tiles,
    fitting_stages,
    sharing_stages,
    widens_operands,
)

_MOST_STAGES = 4
_FEW_PARTS = 4
_JOIN_ELEMENTS = 4096  # partial results that a warp loads at once: 128 registers a thread


@triton.jit(
    do_not_specialize_on_alignment=[
        "first_rows_ptr",
        "shared_first_rows_ptr",
        "shared_lens_ptr",
        "context_lens_ptr",
    ]
)
def _decode_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    kv_ptr,
    out_ptr,
    workspace_ptr,
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
    NUM_TEAMS: tl.constexpr,
    PLAN_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TOKENS_PER_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDENS: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    start_dependents(IS_DEPENDENT)
    wait_for_dependencies(IS_DEPENDENT)
    kv_head = tl.program_id(0)
    kv_heads = tl.num_programs(0)
    team = tl.program_id(1)
    plan_ptr = workspace_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    # All four at once: behind the branch, two of them would wait for the others.
    span_end = tl.load(plan_ptr)
    span = tl.load(plan_ptr + 1)
    sequence = tl.load(plan_ptr + 2 + team * 3).to(tl.int64)
    start = tl.load(plan_ptr + 3 + team * 3)
    position = team * span
    if position >= span_end:
        return
    span_end = tl.minimum(position + span, span_end)

    members = tl.arange(0, BLOCK_M)
    heads = kv_head * GROUP + members
    dims = tl.arange(0, BLOCK_D)
    mask = (members < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    q_ptrs = q_ptr + (heads * q_head_stride)[:, None] + dims[None, :]
    row_stride = kv_row_stride.to(tl.int64)
    context_len = tl.load(context_lens_ptr + sequence)
    first_row = tl.load(first_rows_ptr + sequence)
    shared_row = tl.load(shared_first_rows_ptr + sequence)
    shared_len = tl.load(shared_lens_ptr + sequence)
    q = tl.load(q_ptrs + sequence * q_token_stride, mask=mask, other=0.0)
    while position < span_end:
        num_tiles = count_tiles(context_len, TOKENS_PER_ROW, BLOCK_N)
        # Asked for a sequence ahead: while every program reads KV, an answer takes microseconds.
        goes_on = start + num_tiles < span_end
        next_len = tl.load(context_lens_ptr + sequence + 1, mask=goes_on, other=0)
        next_row = tl.load(first_rows_ptr + sequence + 1, mask=goes_on, other=0)
        next_shared_row = tl.load(shared_first_rows_ptr + sequence + 1, mask=goes_on, other=0)
        next_shared_len = tl.load(shared_lens_ptr + sequence + 1, mask=goes_on, other=0)
        next_mask = mask & (members < tl.where(goes_on, GROUP, 0))[:, None]
        next_q = tl.load(q_ptrs + (sequence + 1) * q_token_stride, mask=next_mask, other=0.0)
        k_base = kv_ptr + first_row * row_stride + kv_head * kv_head_stride
        shared_shift = (shared_row - first_row).to(tl.int32)
        begin = position - start
        end = tl.minimum(num_tiles, span_end - start)

        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        positions = context_len - 1 + tl.zeros([BLOCK_M], dtype=tl.int32)
        # Masked throughout: a loop of its own for whole tiles was no faster.
        for tile in range(begin, end):
            acc, top, total = attend_tile(
                acc, top, total, q, positions, k_base, shared_shift, shared_len, row_stride, kv_value_stride,
                kv_token_stride, tile, context_len, scale_log2,
                HEAD_DIM, TOKENS_PER_ROW, BLOCK_N, BLOCK_D, True, True, WIDENS,
            )  # fmt: skip

        if (begin == 0) & (end == num_tiles):
            out = (acc / tl.where(total > 0.0, total, 1.0)[:, None]).to(out_ptr.dtype.element_ty)
            out_ptrs = out_ptr + sequence * out_token_stride + (heads * out_head_stride)[:, None]
            tl.store(out_ptrs + dims[None, :], out, mask=mask)
        else:
            # Part 0 of a team goes on with a sequence of the team before, part 1 is left to the next.
            parts = ((team * 2 + tl.where(begin == 0, 1, 0)) * kv_heads + kv_head) * GROUP + members
            partial_ptr = workspace_ptr + PLAN_SIZE
            stats_ptr = partial_ptr + NUM_TEAMS * 2 * kv_heads * GROUP * HEAD_DIM
            tl.store(partial_ptr + (parts * HEAD_DIM)[:, None] + dims[None, :], acc, mask=mask)
            tl.store(stats_ptr + parts * 2, top, mask=members < GROUP)
            tl.store(stats_ptr + parts * 2 + 1, total, mask=members < GROUP)
        position = start + end
        start += num_tiles
        sequence += 1
        context_len = next_len
        first_row = next_row
        shared_row = next_shared_row
        shared_len = next_shared_len
        q = next_q


@triton.jit
def _join_parts(  # type: ignore[no-untyped-def]
    partial_ptr,
    stats_ptr,
    team,
    num_parts,
    head,
    num_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """The attention (BLOCK_D,) of a head from the parts that `team` and those after it left."""
    dims = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    top = float("-inf")
    total = 0.0
    for first in range(0, num_parts, BLOCK_PARTS):
        parts = first + tl.arange(0, BLOCK_PARTS)
        is_part = parts < num_parts
        places = ((team + parts) * 2 + tl.where(parts == 0, 1, 0)) * num_heads + head
        tops = tl.load(stats_ptr + places * 2, mask=is_part, other=float("-inf"))
        totals = tl.load(stats_ptr + places * 2 + 1, mask=is_part, other=0.0)
        part_ptrs = partial_ptr + (places * HEAD_DIM)[:, None] + dims[None, :]
        mask = is_part[:, None] & (dims < HEAD_DIM)[None, :]
        partial = tl.load(part_ptrs, mask=mask, other=0.0)
        new_top = tl.maximum(top, tl.max(tops, 0))
        shrink = tl.exp2(top - new_top)
        weights = tl.exp2(tops - new_top)
        acc = acc * shrink + tl.sum(partial * weights[:, None], 0)
        total = total * shrink + tl.sum(totals * weights, 0)
        top = new_top
    return acc / total


@triton.jit
def _join_kernel(  # type: ignore[no-untyped-def]
    out_ptr,
    workspace_ptr,
    out_token_stride,
    out_head_stride,
    NUM_TEAMS: tl.constexpr,
    PLAN_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FEW_PARTS: tl.constexpr,
    MANY_PARTS: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    start_dependents(IS_DEPENDENT)
    wait_for_dependencies(IS_DEPENDENT)
    head = tl.program_id(0)
    num_heads = tl.num_programs(0)
    team = tl.program_id(1)
    plan_ptr = workspace_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    num_tiles = tl.load(plan_ptr)
    span = tl.load(plan_ptr + 1)
    # The sequence that the next team begins in: this team's to join if it is the first to have read of it.
    sequence = tl.load(plan_ptr + 5 + team * 3).to(tl.int64)
    start = tl.load(plan_ptr + 6 + team * 3)
    end = tl.load(plan_ptr + 7 + team * 3)
    boundary = (team + 1) * span
    if (boundary >= num_tiles) | (start >= boundary) | (start < boundary - span):
        return
    num_parts = (end - 1) // span - team + 1
    partial_ptr = workspace_ptr + PLAN_SIZE
    stats_ptr = partial_ptr + NUM_TEAMS * 2 * num_heads * HEAD_DIM
    dims = tl.arange(0, BLOCK_D)
    out_ptrs = out_ptr + sequence * out_token_stride + head * out_head_stride + dims
    # In a large batch most have two parts; one long sequence has one of nearly every team.
    if num_parts <= FEW_PARTS:
        out = _join_parts(
            partial_ptr, stats_ptr, team, num_parts, head, num_heads, HEAD_DIM, BLOCK_D, FEW_PARTS
        )
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)
    else:
        out = _join_parts(
            partial_ptr, stats_ptr, team, num_parts, head, num_heads, HEAD_DIM, BLOCK_D, MANY_PARTS
        )
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


@dataclass(frozen=True, slots=True)
class _Launch:
    """What a launch needs besides tensors and strides; the same for every layer and step."""

    workspace_floats: int
    decode_grid: tuple[int, int]
    decode_settings: dict[str, Any]
    join_grid: tuple[int, int]
    join_settings: dict[str, Any]


@cache
def _launch(
    query_heads: int,
    kv_heads: int,
    tokens_per_row: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> _Launch:
    group = query_heads // kv_heads
    division = divide(kv_heads, tokens_per_row, head_dim, dtype, device)
    tile, num_teams = division.tile, division.num_teams
    block_m = max(16, triton.next_power_of_2(group))
    common = {
        "NUM_TEAMS": num_teams,
        "PLAN_SIZE": division.plan_size,
        "HEAD_DIM": head_dim,
        "BLOCK_D": tile.block_dim,
    }
    return _Launch(
        workspace_floats=division.workspace_floats(group),
        decode_grid=(kv_heads, num_teams),
        decode_settings={
            **common,
            "GROUP": group,
            "TOKENS_PER_ROW": tokens_per_row,
            "BLOCK_M": block_m,
            "BLOCK_N": tile.block_tokens,
            "WIDENS": widens_operands(dtype),
            "num_warps": 4,
            **_decode_start(tile, block_m, dtype.itemsize, device),
        },
        join_grid=(query_heads, num_teams - 1),
        join_settings={
            **common,
            "FEW_PARTS": _FEW_PARTS,
            "MANY_PARTS": max(2 * _FEW_PARTS, _JOIN_ELEMENTS // tile.block_dim),
            "num_warps": 1,  # H100, 8 x 512: 8.7 us in all, 9.4 with two, 10.9 with four
            **launch_options(device),
        },
    )


def _decode_start(tile: TileShape, block_m: int, element_bytes: int, device: torch.device) -> dict[str, Any]:
    """How the kernel starts, and its stages.

    A kernel started early finds room on some SMs before others, and crowds them if more of its programs fit
    there than an even spread has (H100, 256 x 1k: 0.396 ms instead of 0.362). It starts early only where a
    few stages fill the shared memory: tiles of 64 dims would need seven, 6 % slower than a plain start.
    """
    stages = sharing_stages(tile, block_m, element_bytes, PROGRAMS_PER_SM, device)
    if stages <= _MOST_STAGES:
        return {"num_stages": stages, **launch_options(device)}
    return {"num_stages": fitting_stages(tile, block_m, element_bytes, device), "IS_DEPENDENT": False}


def decode_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    first_rows: torch.Tensor,
    shared_first_rows: torch.Tensor,
    shared_lens: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    workspace: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """See `kernels.reference.decode_attention`. Raises ValueError naming an argument that is wrong."""
    _check(q, kv, first_rows, shared_first_rows, shared_lens, context_lens, out)
    batch, query_heads, head_dim = q.shape
    if batch == 0:
        return out
    launch = _launch(query_heads, kv.shape[3], kv.shape[2], head_dim, q.dtype, q.device)
    require_workspace(workspace, launch.workspace_floats, q)
    out_strides = out.stride(0), out.stride(1)
    _decode_kernel[launch.decode_grid](
        q, kv, out, workspace, first_rows, shared_first_rows, shared_lens, context_lens, scale * LOG2_E,
        q.stride(0), q.stride(1), *kv.stride()[:4], *out_strides, **launch.decode_settings,
    )  # fmt: skip
    if launch.join_grid[1]:
        _join_kernel[launch.join_grid](out, workspace, *out_strides, **launch.join_settings)
    return out


def _check(
    q: torch.Tensor,
    kv: torch.Tensor,
    first_rows: torch.Tensor,
    shared_first_rows: torch.Tensor,
    shared_lens: torch.Tensor,
    context_lens: torch.Tensor,
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
    require_index("shared_first_rows", shared_first_rows, q.shape[0], torch.int64, q)
    require_index("shared_lens", shared_lens, q.shape[0], torch.int32, q)
    require_index("context_lens", context_lens, q.shape[0], torch.int32, q)
