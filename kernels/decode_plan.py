"""The division of a step's decode attention: where each team's span of KV tiles begins.

Made once a step from the context lengths on the device; every layer's `decode_attention` walks by it.
The workspace holds, in this order:

    int32    tiles of all sequences; tiles of a span
             for each team: the sequence it begins in; where that begins and ends, counted in tiles over
             all sequences
    float32  (teams, 2, kv_heads, group, head_dim): partial results, of the sequence that a team goes on
             with and of the one that it leaves unfinished
             (teams, 2, kv_heads, group, 2): their largest scores and sums

Semantics: `kernels.reference`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from kernels.checks import require, require_index, require_launchable, require_pool
from kernels.dependent_launch import launch_options, start_dependents, wait_for_dependencies
from kernels.kv_tile import TileShape, count_tiles, tile_shape

_TILE_TOKENS = 64
_TILE_BYTES = 16 * 1024
# H100, 32/8 heads of 128, TB/s at 256 x 1k, 64 x 8k, 8 x 4k: two programs an SM 2.94, 3.04, 2.50; three
# 2.92, 3.01, 2.43; six 2.84, 3.01, 2.33; one of eight warps on tiles twice as long 2.96, 3.04, 2.52, but
# less for ragged lengths.
PROGRAMS_PER_SM = 2
_MAX_WAVES = 4
_MIN_FILL = 0.96
_INTERPRETED_SMS = 8  # few: contexts are split, and tests stay quick
_BLOCK_SEQUENCES = 128
_BLOCK_TEAMS = 32


@dataclass(frozen=True, slots=True)
class Division:
    """What shapes and the device fix of the division; lengths decide the rest, on the device.

    Attributes:
        tile: how rows are cut.
        num_teams: the spans there are at most; each has a program for each KV head.
        plan_size: elements of the workspace before the partial results.
        group_floats: elements of the partial results for each query head of a group.
    """

    tile: TileShape
    num_teams: int
    plan_size: int
    group_floats: int

    def workspace_floats(self, group: int) -> int:
        """Elements of the workspace, for `group` query heads a KV head."""
        return self.plan_size + group * self.group_floats


@cache
def divide(
    kv_heads: int, tokens_per_row: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> Division:
    """The division for pools of that shape on a device; worked out once."""
    num_teams = count_teams(kv_heads, _num_sms(device))
    return Division(
        tile=tile_shape(tokens_per_row, head_dim, dtype.itemsize, _TILE_TOKENS, _TILE_BYTES),
        num_teams=num_teams,
        plan_size=-(-(2 + num_teams * 3) // 32) * 32,  # what follows is aligned
        group_floats=num_teams * 2 * kv_heads * (head_dim + 2),
    )


def count_teams(kv_heads: int, num_sms: int) -> int:
    """Teams of `kv_heads` programs: so many that whole waves of programs fill the GPU.

    One wave where the heads divide it, as 8 do; else the fewest that leave little of the last one idle.
    """
    teams = 0
    for waves in range(1, _MAX_WAVES + 1):
        slots = waves * num_sms * PROGRAMS_PER_SM
        teams = slots // kv_heads
        if teams * kv_heads >= _MIN_FILL * slots:
            break
    return max(1, teams)


def decode_workspace_floats(query_heads: int, kv_heads: int, head_dim: int) -> int:
    """See `kernels.reference.decode_workspace_floats`: for the current device, whatever the batch.

    1.1 MiB on an H100 for 32 query and 8 KV heads of 128.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    division = divide(kv_heads, 1, head_dim, torch.float32, torch.device(device))
    return division.workspace_floats(query_heads // kv_heads)


@triton.jit(do_not_specialize=["batch"], do_not_specialize_on_alignment=["context_lens_ptr"])
def _plan_kernel(  # type: ignore[no-untyped-def]
    workspace_ptr,
    context_lens_ptr,
    batch,
    NUM_TEAMS: tl.constexpr,
    TOKENS_PER_ROW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SEQUENCES: tl.constexpr,
    BLOCK_TEAMS: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    start_dependents(IS_DEPENDENT)
    wait_for_dependencies(IS_DEPENDENT)
    plan_ptr = workspace_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    num_tiles = 0
    for first in range(0, batch, BLOCK_SEQUENCES):
        sequences = first + tl.arange(0, BLOCK_SEQUENCES)
        lens = tl.load(context_lens_ptr + sequences, mask=sequences < batch, other=0)
        num_tiles += tl.sum(count_tiles(lens, TOKENS_PER_ROW, BLOCK_N), 0)
    # As many spans as teams, down to one tile: 1 x 1k takes 6.3 us so, 7.1 with two tiles, 8.8 with four.
    span = (num_tiles + NUM_TEAMS - 1) // NUM_TEAMS

    teams = tl.program_id(0) * BLOCK_TEAMS + tl.arange(0, BLOCK_TEAMS)
    # A team begins in the first sequence that ends after its span's first tile.
    passed = tl.zeros([BLOCK_TEAMS], dtype=tl.int32)
    starts = tl.zeros([BLOCK_TEAMS], dtype=tl.int32)
    stops = tl.zeros([BLOCK_TEAMS], dtype=tl.int32) + num_tiles
    counted = 0
    for first in range(0, batch, BLOCK_SEQUENCES):
        sequences = first + tl.arange(0, BLOCK_SEQUENCES)
        lens = tl.load(context_lens_ptr + sequences, mask=sequences < batch, other=0)
        tiles = count_tiles(lens, TOKENS_PER_ROW, BLOCK_N)
        ends = (counted + tl.cumsum(tiles, 0))[:, None]
        is_passed = ends <= (teams * span)[None, :]
        passed += tl.sum(is_passed.to(tl.int32), 0)
        starts = tl.maximum(starts, tl.max(tl.where(is_passed, ends, 0), 0))
        stops = tl.minimum(stops, tl.min(tl.where(is_passed, num_tiles, ends), 0))
        counted += tl.sum(tiles, 0)

    if tl.program_id(0) == 0:
        tl.store(plan_ptr, num_tiles)
        tl.store(plan_ptr + 1, span)
    tl.store(plan_ptr + 2 + teams * 3, passed, mask=teams < NUM_TEAMS)
    tl.store(plan_ptr + 3 + teams * 3, starts, mask=teams < NUM_TEAMS)
    tl.store(plan_ptr + 4 + teams * 3, stops, mask=teams < NUM_TEAMS)


def decode_plan(kv: torch.Tensor, context_lens: torch.Tensor, workspace: torch.Tensor) -> None:
    """See `kernels.reference.decode_plan`. Raises ValueError naming an argument that is wrong."""
    require_launchable("context_lens", context_lens)
    require_pool(kv, kv)
    require(context_lens.dim() == 1, "context_lens", "of shape (sequences,)")
    require_index("context_lens", context_lens, context_lens.numel(), torch.int32, kv)
    tokens_per_row, kv_heads, head_dim = kv.shape[2:]
    division = divide(kv_heads, tokens_per_row, head_dim, kv.dtype, kv.device)
    require_workspace(workspace, division.plan_size, kv)
    _plan_kernel[(triton.cdiv(division.num_teams, _BLOCK_TEAMS),)](
        workspace, context_lens, context_lens.numel(),
        NUM_TEAMS=division.num_teams, TOKENS_PER_ROW=tokens_per_row,
        BLOCK_N=division.tile.block_tokens, BLOCK_SEQUENCES=_BLOCK_SEQUENCES, BLOCK_TEAMS=_BLOCK_TEAMS,
        num_warps=4, **launch_options(kv.device),
    )  # fmt: skip


def require_workspace(workspace: torch.Tensor, floats: int, like: torch.Tensor) -> None:
    """`workspace` is a contiguous float32 vector of at least `floats` elements on the device of `like`."""
    is_vector = workspace.dim() == 1 and workspace.dtype == torch.float32 and workspace.is_contiguous()
    if not (is_vector and workspace.numel() >= floats and workspace.device == like.device):
        raise ValueError(
            f"workspace must be a contiguous float32 vector of {floats} or more on {like.device}"
        )


@cache
def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count
