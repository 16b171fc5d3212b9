"""The consumers of the Hopper prefill kernel: warpgroups that compute, 64 rows of a tile of queries each.

While a consumer works on the softmax of tile j, its product of the weights of tile j - 1 with their values
is under way. The two issue products in turn, so that one's softmax lies beside the other's products.

What limits a long prompt is energy: the card draws all the power it may, and lowers its clock until the
tensor cores are busy for three quarters of the time. So what the softmax does counts whether or not it is
hidden, and looking for each row's largest score costs 5 % of the whole. But a weight is a float, and needs a
reference near that score, not the score itself. Only one tile in TILES_PER_LOOK is looked at; weights of the
others refer to the largest score before, and are above 1 where theirs is larger. A jump that a float cannot
hold shows in the sums in the end: then the consumer's verdict is that the tile of queries has to be computed
again, with a look at each tile of keys.

TFLOP/s of one second without a pause, means of two (H200, 32/8 heads of 128, new tokens on cached ones):

    looks, turns                        4,096 on 64,000   512 on 16,384   8,192   2,048 on 6,000
    at each tile, none                        607              575         568         560
    at each tile, in turn                     587              571         557         546
    at one of 17, none                        654              552         571         562
    at one of 17, in turn                     654              614         580         580

Buffers, barriers and notes: `kernels.prefill_hopper_kernel`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Of sums and accumulated values. What is beyond may have been infinite on the way: float32 ends at 2^128.
_LIMIT = gl.constexpr(2.0**100)


@gluon.jit
def _await_full(full, step, STAGES: gl.constexpr):  # type: ignore[no-untyped-def]
    mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)


@gluon.jit
def _await_turn(may_issue, W: gl.constexpr, step):  # type: ignore[no-untyped-def]
    """Until the other consumer has issued its products of the step before, or of this one if it is first."""
    mbarrier.wait(may_issue.index(W), (step & 1) ^ (1 - W))


@gluon.jit
def _noted(note, index: gl.constexpr, layout: gl.constexpr):  # type: ignore[no-untyped-def]
    return gl.sum(gl.where(gl.arange(0, 8, layout) == index, note, 0), 0)


@gluon.jit
def _scores(q, k_smem, step, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr):  # type: ignore[no-untyped-def]
    """The product of the queries with a tile of keys, under way."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    k = k_smem.index(step % STAGES).reshape([BLOCK_N, BLOCK_D])
    zeros = gl.zeros([64, BLOCK_N], gl.float32, layout)
    return warpgroup_mma(q, k.permute([1, 0]), zeros, use_acc=False, is_async=True)


@gluon.jit
def _mask(scores, tile, positions, BLOCK_N: gl.constexpr):  # type: ignore[no-untyped-def]
    keys = tile * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, scores.type.layout))
    return gl.where(keys[None, :] <= positions[:, None], scores, float("-inf"))


@gluon.jit
def _attend_tile(  # type: ignore[no-untyped-def]
    W: gl.constexpr, acc, weights, top, total, q, buffers, barriers, step, tile, positions, scale_log2,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    LOOKS: gl.constexpr, IS_MASKED: gl.constexpr,
):  # fmt: skip
    """One step of the online softmax, in base 2: a tile's scores, and the values of the tile before.

    Unless it LOOKS for the largest score, weights refer to that of earlier tiles, and may be above 1. Which
    tile it is matters only if it IS_MASKED.
    """
    _, k_smem, v_smem, _, _ = buffers
    _, _, k_full, k_empty, v_full, v_empty, _, _, _, may_issue = barriers
    acc_layout: gl.constexpr = acc.type.layout
    before = step - 1
    _await_full(k_full, step, STAGES)
    _await_turn(may_issue, W, step)
    scores = _scores(q, k_smem, step, BLOCK_N, BLOCK_D, STAGES)
    _await_full(v_full, before, STAGES)
    v = v_smem.index(before % STAGES).reshape([BLOCK_N, BLOCK_D])
    acc = warpgroup_mma(weights, v, acc, is_async=True)
    mbarrier.arrive(may_issue.index(1 - W), count=1)
    scores = warpgroup_mma_wait(1, [scores])
    mbarrier.arrive(k_empty.index(step % STAGES), count=1)
    if IS_MASKED:
        scores = _mask(scores, tile, positions, BLOCK_N)
    new_top = gl.maximum(top, gl.max(scores, 1)) if LOOKS else top
    scores = gl.exp2(scores * scale_log2 - (new_top * scale_log2)[:, None])
    sums = gl.sum(scores, 1)
    if LOOKS:
        shrink = gl.exp2((top - new_top) * scale_log2)
        total = total * shrink
    total += sums
    acc = warpgroup_mma_wait(0, [acc])
    mbarrier.arrive(v_empty.index(before % STAGES), count=1)
    if LOOKS:
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc_layout))[:, None]
    weights = gl.convert_layout(scores.to(weights.dtype), weights.type.layout)
    return acc, weights, new_top, total


@gluon.jit
def _clear_tail(v, first_token, context_len, W: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr):  # type: ignore[no-untyped-def]
    """Zero values past the context, in this consumer's half of a tile: they may be NaN, and 0 * NaN is."""
    HALF: gl.constexpr = BLOCK_N // 2
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    half = v.slice(W * HALF, HALF)
    tokens = first_token + W * HALF + gl.arange(0, HALF, gl.SliceLayout(1, layout))
    values = half.load(layout)
    half.store(gl.where((tokens < context_len)[:, None], values, gl.zeros_like(values)))
    fence_async_shared()  # wgmma reads through another path than the stores above


@gluon.jit
def _store(  # type: ignore[no-untyped-def]
    result, out_ptr, query, limit, slot, token_stride_8, head_stride_8,
    W: gl.constexpr, HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = result.type.layout
    rows = gl.arange(0, 64, gl.SliceLayout(1, layout))
    dims = gl.arange(0, BLOCK_D, gl.SliceLayout(0, layout))
    tokens = W * (64 // HEADS) + rows // HEADS
    heads = slot * HEADS + rows % HEADS
    # Strides come divided by 8, which lets the compiler see that 16 bytes a store are aligned.
    offsets = ((query + tokens).to(gl.int64) * token_stride_8 + heads * head_stride_8) * 8
    mask = (tokens < limit)[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (dims < HEAD_DIM)[None, :]
    gl.store(out_ptr + offsets[:, None] + dims[None, :], result, mask=mask)


@gluon.jit
def _is_beyond(acc, total, num_rows, LIMIT: gl.constexpr):  # type: ignore[no-untyped-def]
    """1 if a sum or an accumulated value of the first rows is larger than LIMIT, or no number; else 0."""
    layout: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    values = gl.max(gl.where(gl.abs(acc) <= LIMIT, 0, 1), 1)
    values = gl.where(gl.convert_layout(total, layout) <= LIMIT, values, 1)
    return gl.max(gl.where(gl.arange(0, 64, layout) < num_rows, values, 0), 0)


@gluon.jit
def consume(  # type: ignore[no-untyped-def]
    W: gl.constexpr, buffers, barriers, out_ptr, out_token_stride_8, out_head_stride_8, scale_log2,
    HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr, TILES_PER_LOOK: gl.constexpr,
):  # fmt: skip
    """Consumer W (0 or 1): its half of every tile of queries that is noted, until a note of the end."""
    q_smem, k_smem, v_smem, note_smem, verdict_smem = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, note_full, note_empty, tail_clear, may_issue = barriers
    HALF_TOKENS: gl.constexpr = 64 // HEADS
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    note_layout: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    step = 0
    turn = 0
    num_tails = 0
    limit = 1
    while limit > 0:
        _await_full(note_full, turn, 2)
        note = note_smem.index(turn & 1).load(note_layout)
        limit = _noted(note, 1, note_layout)
        if limit > 0:
            position = _noted(note, 2, note_layout)
            tiles_per_look = _noted(note, 5, note_layout)
            num_tiles = gl.cdiv(position + gl.minimum(limit, 2 * HALF_TOKENS), BLOCK_N)
            # Tiles that end at or before the first query are seen whole by all of them.
            num_full = gl.minimum((position + W * HALF_TOKENS + 1) // BLOCK_N, num_tiles)
            tokens = W * HALF_TOKENS + gl.arange(0, 64, gl.SliceLayout(1, score_layout)) // HEADS
            positions = position + tokens
            q = q_smem.index(W).reshape([64, BLOCK_D])
            mbarrier.wait(q_full.index(W), turn & 1)
            _await_full(k_full, step, STAGES)
            _await_turn(may_issue, W, step)
            scores = _scores(q, k_smem, step, BLOCK_N, BLOCK_D, STAGES)
            mbarrier.arrive(may_issue.index(1 - W), count=1)
            scores = warpgroup_mma_wait(0, [scores])
            mbarrier.arrive(k_empty.index(step % STAGES), count=1)
            scores = _mask(scores, 0, positions, BLOCK_N)
            top = gl.max(scores, 1)
            scores = gl.exp2(scores * scale_log2 - (top * scale_log2)[:, None])
            total = gl.sum(scores, 1)
            weights = gl.convert_layout(scores.to(q_smem.dtype), gl.DotOperandLayout(0, acc_layout, 2))
            acc = gl.zeros([64, BLOCK_D], gl.float32, acc_layout)
            step += 1
            num_later = gl.maximum(num_full, 1) - 1
            for _ in range(num_later // tiles_per_look):
                acc, weights, top, total = _attend_tile(
                    W, acc, weights, top, total, q, buffers, barriers, step, 0, positions, scale_log2,
                    BLOCK_N, BLOCK_D, STAGES, True, False,
                )  # fmt: skip
                step += 1
                if TILES_PER_LOOK > 1:
                    # In pairs: by itself a tile's weights would be moved to where the next one wants them.
                    for _ in range(tiles_per_look // 2):
                        acc, weights, top, total = _attend_tile(
                            W, acc, weights, top, total, q, buffers, barriers, step, 0, positions, scale_log2,
                            BLOCK_N, BLOCK_D, STAGES, False, False,
                        )  # fmt: skip
                        step += 1
                        acc, weights, top, total = _attend_tile(
                            W, acc, weights, top, total, q, buffers, barriers, step, 0, positions, scale_log2,
                            BLOCK_N, BLOCK_D, STAGES, False, False,
                        )  # fmt: skip
                        step += 1
            for _ in range(num_later % tiles_per_look):
                acc, weights, top, total = _attend_tile(
                    W, acc, weights, top, total, q, buffers, barriers, step, 0, positions, scale_log2,
                    BLOCK_N, BLOCK_D, STAGES, True, False,
                )  # fmt: skip
                step += 1
            for tile in range(gl.maximum(num_full, 1), num_tiles):
                acc, weights, top, total = _attend_tile(
                    W, acc, weights, top, total, q, buffers, barriers, step, tile, positions, scale_log2,
                    BLOCK_N, BLOCK_D, STAGES, True, True,
                )  # fmt: skip
                step += 1
            mbarrier.arrive(q_empty.index(W), count=1)

            # Read again, for want of registers in the loops.
            note = note_smem.index(turn & 1).load(note_layout)
            context_len = _noted(note, 4, note_layout)
            last = (step - 1) % STAGES
            v = v_smem.index(last).reshape([BLOCK_N, BLOCK_D])
            _await_full(v_full, step - 1, STAGES)
            if num_tiles * BLOCK_N > context_len:
                _clear_tail(v, (num_tiles - 1) * BLOCK_N, context_len, W, BLOCK_N, BLOCK_D)
                mbarrier.arrive(tail_clear, count=1)
                mbarrier.wait(tail_clear, num_tails & 1)
                num_tails += 1
            acc = warpgroup_mma_wait(0, [warpgroup_mma(weights, v, acc, is_async=True)])
            mbarrier.arrive(v_empty.index(last), count=1)
            if TILES_PER_LOOK > 1:
                num_rows = (_noted(note, 1, note_layout) - W * HALF_TOKENS) * HEADS
                verdict = gl.where(
                    _noted(note, 5, note_layout) > 1, _is_beyond(acc, total, num_rows, _LIMIT), 0
                )
                verdict_smem.index((turn & 1) * 2 + W).store(note * 0 + verdict)
            result = (acc / gl.convert_layout(total, gl.SliceLayout(1, acc_layout))[:, None]).to(q_smem.dtype)
            if BLOCK_D <= 128:  # through shared memory, into whole lines; wider results find no room there
                result = gl.convert_layout(
                    result, gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
                )
            _store(
                result, out_ptr, _noted(note, 0, note_layout), _noted(note, 1, note_layout),
                _noted(note, 3, note_layout), out_token_stride_8, out_head_stride_8,
                W, HEADS, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
        mbarrier.arrive(note_empty.index(turn & 1), count=1)
        turn += 1
