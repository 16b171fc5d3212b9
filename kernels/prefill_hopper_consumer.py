"""The consumers of the Hopper prefill kernel: warpgroups that compute, 64 rows of a tile of queries each.

While a consumer works on the softmax of tile j, its product of the weights of tile j - 1 with their values
is under way, and the other consumer's products fill what is left of the tensor cores: the two drift apart
by themselves. Making them take turns at named barriers, or holding the wait for the values behind the
exponentials, changed no figure by more than repeated runs differ (H100, 3 %).

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


@gluon.jit
def _await_full(full, step, STAGES: gl.constexpr):  # type: ignore[no-untyped-def]
    mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)


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
    acc, weights, top, total, q, buffers, barriers, step, tile, positions, scale_log2,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, IS_MASKED: gl.constexpr,
):  # fmt: skip
    """One step of the online softmax, in base 2: tile's scores, and the values of the tile before."""
    _, k_smem, v_smem, _ = buffers
    _, _, k_full, k_empty, v_full, v_empty, _, _, _ = barriers
    acc_layout: gl.constexpr = acc.type.layout
    before = step - 1
    _await_full(k_full, step, STAGES)
    scores = _scores(q, k_smem, step, BLOCK_N, BLOCK_D, STAGES)
    _await_full(v_full, before, STAGES)
    v = v_smem.index(before % STAGES).reshape([BLOCK_N, BLOCK_D])
    acc = warpgroup_mma(weights, v, acc, is_async=True)
    scores = warpgroup_mma_wait(1, [scores])
    mbarrier.arrive(k_empty.index(step % STAGES), count=1)
    if IS_MASKED:
        scores = _mask(scores, tile, positions, BLOCK_N)
    new_top = gl.maximum(top, gl.max(scores, 1))
    shrink = gl.exp2((top - new_top) * scale_log2)
    scores = gl.exp2(scores * scale_log2 - (new_top * scale_log2)[:, None])
    total = total * shrink + gl.sum(scores, 1)
    acc = warpgroup_mma_wait(0, [acc])
    mbarrier.arrive(v_empty.index(before % STAGES), count=1)
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
def consume(  # type: ignore[no-untyped-def]
    W: gl.constexpr, buffers, barriers, out_ptr, out_token_stride_8, out_head_stride_8, scale_log2,
    HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Consumer W (0 or 1): its half of every tile of queries that is noted, until a note of none."""
    q_smem, k_smem, v_smem, note_smem = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, note_full, note_empty, tail_clear = barriers
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
        query = _noted(note, 0, note_layout)
        limit = _noted(note, 1, note_layout)
        position = _noted(note, 2, note_layout)
        slot = _noted(note, 3, note_layout)
        context_len = _noted(note, 4, note_layout)
        mbarrier.arrive(note_empty.index(turn & 1), count=1)
        if limit > 0:
            num_tiles = gl.cdiv(position + gl.minimum(limit, 2 * HALF_TOKENS), BLOCK_N)
            # Tiles that end at or before the first query are seen whole by all of them.
            num_full = gl.minimum((position + W * HALF_TOKENS + 1) // BLOCK_N, num_tiles)
            tokens = W * HALF_TOKENS + gl.arange(0, 64, gl.SliceLayout(1, score_layout)) // HEADS
            positions = position + tokens
            q = q_smem.index(W).reshape([64, BLOCK_D])
            mbarrier.wait(q_full.index(W), turn & 1)
            _await_full(k_full, step, STAGES)
            scores = warpgroup_mma_wait(0, [_scores(q, k_smem, step, BLOCK_N, BLOCK_D, STAGES)])
            mbarrier.arrive(k_empty.index(step % STAGES), count=1)
            scores = _mask(scores, 0, positions, BLOCK_N)
            top = gl.max(scores, 1)
            scores = gl.exp2(scores * scale_log2 - (top * scale_log2)[:, None])
            total = gl.sum(scores, 1)
            weights = gl.convert_layout(scores.to(q_smem.dtype), gl.DotOperandLayout(0, acc_layout, 2))
            acc = gl.zeros([64, BLOCK_D], gl.float32, acc_layout)
            step += 1
            for tile in range(1, num_full):
                acc, weights, top, total = _attend_tile(
                    acc, weights, top, total, q, buffers, barriers, step, tile, positions, scale_log2,
                    BLOCK_N, BLOCK_D, STAGES, False,
                )  # fmt: skip
                step += 1
            for tile in range(gl.maximum(num_full, 1), num_tiles):
                acc, weights, top, total = _attend_tile(
                    acc, weights, top, total, q, buffers, barriers, step, tile, positions, scale_log2,
                    BLOCK_N, BLOCK_D, STAGES, True,
                )  # fmt: skip
                step += 1
            mbarrier.arrive(q_empty.index(W), count=1)

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
            result = (acc / gl.convert_layout(total, gl.SliceLayout(1, acc_layout))[:, None]).to(q_smem.dtype)
            if BLOCK_D <= 128:  # through shared memory, into whole lines; wider results find no room there
                result = gl.convert_layout(
                    result, gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
                )
            _store(result, out_ptr, query, limit, slot, out_token_stride_8, out_head_stride_8,
                   W, HEADS, HEAD_DIM, BLOCK_D)  # fmt: skip
        turn += 1
