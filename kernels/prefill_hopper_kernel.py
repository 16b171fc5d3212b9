"""The prefill kernel of Hopper GPUs, in Gluon: its producer, and what producer and consumers share.

A program is three partitions that stay on an SM and take one tile of queries after another:

    producer    one warp: takes the next tile, notes it for the consumers, loads Q, K and V by TMA
    consumers   two warpgroups, 64 rows of the tile each: products by asynchronous wgmma, softmax between

A tile's rows are (token, head) pairs, HEADS heads of one group a token, so that one read of K and V
serves them all. Rings of STAGES tiles of K and of V join producer and consumers. For each place in a ring
there is a barrier that says it is full and one that says it is empty; step s uses place s % STAGES for the
(s // STAGES)-th time, whose parity is what a barrier is asked for. Queries have a place for each consumer,
notes have two: (first query, queries left, first query's position, slot, context length, tiles of keys for
each look at their largest score), where no queries left is the end. A note's place is empty again when both
consumers are done with its tile and have left their verdicts: whether it has to be computed again.

Tiles of keys lie within a row of the pool, so no load reaches into a row that may be unmapped.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
)

from kernels.prefill_hopper_consumer import consume

# Triton 3.9 has the first name, 3.6 the second.
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def _find_row(tile, first_row, shared_row, shared_rows, TILES_PER_ROW: gl.constexpr):  # type: ignore[no-untyped-def]
    """The row that holds a tile of keys: a sequence's first `shared_rows` rows lie from `shared_row` on."""
    row = tile // TILES_PER_ROW
    return row + gl.where(row < shared_rows, shared_row, first_row)


@gluon.jit
def _load_kv(kv_desc, row, part, token, head, ring, full, empty, step, STAGES: gl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of keys (part 0) or values (1) into its place, once both consumers are done with the last."""
    stage = step % STAGES
    mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(stage), kv_desc.block_type.nbytes)
    _tma_load(kv_desc, [row, part, token, head, 0], full.index(stage), ring.index(stage))


@gluon.jit
def _find_sequence(  # type: ignore[no-untyped-def]
    work, sequence, first_work, query_starts_ptr, num_sequences, num_slots, BLOCK_TOKENS: gl.constexpr
):
    """The sequence that holds tile `work`, from `sequence` on, whose tiles begin at `first_work`.

    Returns (whether there is one, sequence, its first tile, its first query, its queries).
    """
    is_found = False
    query_start = 0
    num_queries = 0
    while (sequence < num_sequences) & (not is_found):
        query_start = gl.load(query_starts_ptr + sequence)
        num_queries = gl.load(query_starts_ptr + sequence + 1) - query_start
        num_work = gl.cdiv(num_queries, BLOCK_TOKENS) * num_slots
        if work < first_work + num_work:
            is_found = True
        else:
            first_work += num_work
            sequence += 1
    return is_found, sequence, first_work, query_start, num_queries


@gluon.jit
def _find_tile(  # type: ignore[no-untyped-def]
    work, num_queries, context_len, kv_heads, l2_tokens, SLOTS: gl.constexpr, BLOCK_TOKENS: gl.constexpr
):
    """(first token, slot) of a sequence's tile: KV heads that fit in L2 together, most keys first.

    A slot is HEADS query heads; SLOTS of them share a KV head.
    """
    num_blocks = gl.cdiv(num_queries, BLOCK_TOKENS)
    section = gl.minimum(gl.maximum(l2_tokens // context_len, 1), kv_heads)
    section_work = section * SLOTS * num_blocks
    first_head = work // section_work * section
    width = gl.minimum(section, kv_heads - first_head) * SLOTS
    rest = work % section_work
    return (num_blocks - 1 - rest // width) * BLOCK_TOKENS, first_head * SLOTS + rest % width


@gluon.jit
def _has_failed(verdict_smem, place):  # type: ignore[no-untyped-def]
    """Whether either consumer wants the tile of the note that lay there again."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    first = verdict_smem.index(place * 2).load(layout)
    second = verdict_smem.index(place * 2 + 1).load(layout)
    return gl.max(gl.maximum(first, second), 0) > 0


@gluon.jit
def _produce(  # type: ignore[no-untyped-def]
    q_desc, kv_desc, buffers, barriers, arrays, num_sequences, kv_heads, l2_tokens,
    HEADS: gl.constexpr, SLOTS: gl.constexpr, TOKENS_PER_ROW: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, TILES_PER_LOOK: gl.constexpr,
):  # fmt: skip
    q_smem, k_smem, v_smem, note_smem, verdict_smem = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, note_full, note_empty, _, _ = barriers
    query_starts_ptr, first_rows_ptr, shared_first_rows_ptr, shared_lens_ptr = arrays[:4]
    context_lens_ptr, counter_ptr = arrays[4:]
    HALF_TOKENS: gl.constexpr = 64 // HEADS
    BLOCK_TOKENS: gl.constexpr = 2 * HALF_TOKENS
    TILES_PER_ROW: gl.constexpr = TOKENS_PER_ROW // BLOCK_N
    lanes = gl.arange(0, 8, gl.BlockedLayout([1], [32], [1], [0]))

    next_work = gl.program_id(0)
    next_sequence = 0
    next_first_work = 0
    # Tiles whose verdicts are still to come, of the last turn but one and of the last; -1 is none.
    older = -1
    newer = -1
    turn = 0
    step = 0
    is_found = True
    while is_found:
        mbarrier.wait(note_empty.index(turn & 1), ((turn >> 1) & 1) ^ 1)
        again = -1
        if older >= 0:
            again = gl.where(_has_failed(verdict_smem, turn & 1), older, -1)
        is_found, sequence, first_work, query_start, num_queries = _find_sequence(
            gl.where(again >= 0, again, next_work), gl.where(again >= 0, 0, next_sequence),
            gl.where(again >= 0, 0, next_first_work), query_starts_ptr, num_sequences, kv_heads * SLOTS,
            BLOCK_TOKENS,
        )  # fmt: skip
        if (not is_found) & (newer >= 0):
            # Nothing else to do: the last tile's verdict is waited for.
            mbarrier.wait(note_empty.index((turn + 1) & 1), ((turn - 1) >> 1) & 1)
            if _has_failed(verdict_smem, (turn + 1) & 1):
                again = newer
                is_found, sequence, first_work, query_start, num_queries = _find_sequence(
                    again, turn * 0, turn * 0, query_starts_ptr, num_sequences, kv_heads * SLOTS, BLOCK_TOKENS
                )
            newer = -1
        older = newer
        newer = -1
        if is_found:
            work = gl.where(again >= 0, again, next_work)
            if again < 0:
                next_work = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1)
                next_sequence = sequence
                next_first_work = first_work
                newer = gl.where(TILES_PER_LOOK > 1, work, -1)
            context_len = gl.load(context_lens_ptr + sequence)
            first_row = gl.load(first_rows_ptr + sequence).to(gl.int32)
            shared_row = gl.load(shared_first_rows_ptr + sequence).to(gl.int32)
            shared_rows = gl.load(shared_lens_ptr + sequence) // TOKENS_PER_ROW
            token, slot = _find_tile(
                work - first_work, num_queries, context_len, kv_heads, l2_tokens, SLOTS, BLOCK_TOKENS
            )
            query = query_start + token
            limit = num_queries - token
            position = context_len - limit
            num_tiles = gl.cdiv(position + gl.minimum(limit, BLOCK_TOKENS), BLOCK_N)
            note = gl.where(lanes == 0, query, gl.where(lanes == 1, limit, position))
            note = gl.where(lanes == 3, slot, gl.where(lanes == 4, context_len, note))
            note = gl.where(lanes == 5, gl.where(again >= 0, 1, TILES_PER_LOOK), note)
            note_smem.index(turn & 1).store(note)
            mbarrier.arrive(note_full.index(turn & 1), count=1)

            # Keys one tile ahead of values, in the order in which the consumers want them.
            head = slot // SLOTS
            row = _find_row(0, first_row, shared_row, shared_rows, TILES_PER_ROW)
            _load_kv(kv_desc, row, 0, 0, head, k_smem, k_full, k_empty, step, STAGES)
            for half in gl.static_range(2):
                mbarrier.wait(q_empty.index(half), (turn & 1) ^ 1)
                mbarrier.expect(q_full.index(half), q_desc.block_type.nbytes)
                corner = [query + half * HALF_TOKENS, slot * HEADS, 0]
                _tma_load(q_desc, corner, q_full.index(half), q_smem.index(half))
            for tile in range(1, num_tiles + 1):
                if tile < num_tiles:
                    row = _find_row(tile, first_row, shared_row, shared_rows, TILES_PER_ROW)
                    offset = tile % TILES_PER_ROW * BLOCK_N
                    _load_kv(kv_desc, row, 0, offset, head, k_smem, k_full, k_empty, step + 1, STAGES)
                row = _find_row(tile - 1, first_row, shared_row, shared_rows, TILES_PER_ROW)
                offset = (tile - 1) % TILES_PER_ROW * BLOCK_N
                _load_kv(kv_desc, row, 1, offset, head, v_smem, v_full, v_empty, step, STAGES)
                step += 1
        else:
            note_smem.index(turn & 1).store(lanes * 0)  # no queries: the end
            mbarrier.arrive(note_full.index(turn & 1), count=1)
        turn += 1
    # The last program to end leaves the counters at zero, for a later launch.
    if gl.atomic_add(counter_ptr + 1, 1) == gl.num_programs(0) - 1:
        gl.atomic_xchg(counter_ptr, 0)
        gl.atomic_xchg(counter_ptr + 1, 0)


@gluon.jit(
    do_not_specialize=["num_sequences", "kv_heads", "l2_tokens", "out_token_stride_8", "out_head_stride_8"],
    do_not_specialize_on_alignment=[
        "query_starts_ptr",
        "first_rows_ptr",
        "shared_first_rows_ptr",
        "shared_lens_ptr",
        "context_lens_ptr",
        "counter_ptr",
    ],
)
def prefill_kernel(  # type: ignore[no-untyped-def]
    q_desc, kv_desc, out_ptr, query_starts_ptr, first_rows_ptr, shared_first_rows_ptr, shared_lens_ptr,
    context_lens_ptr, counter_ptr, scale_log2, out_token_stride_8, out_head_stride_8, num_sequences,
    kv_heads, l2_tokens,
    HEADS: gl.constexpr, SLOTS: gl.constexpr, TOKENS_PER_ROW: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, TILES_PER_LOOK: gl.constexpr,
):  # fmt: skip
    """Launched with 4 warps, which are the first consumer; `counter_ptr` holds two zeros.

    q_desc: boxes (64 // HEADS, HEADS, BLOCK_D) of q (tokens, query_heads, head_dim).
    kv_desc: boxes (1, 1, BLOCK_N, 1, BLOCK_D) of kv (rows, 2, T, kv_heads, head_dim).
    """
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2] + q_desc.block_type.shape, q_desc.layout)
    k_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES] + kv_desc.block_type.shape, kv_desc.layout)
    v_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES] + kv_desc.block_type.shape, kv_desc.layout)
    note_smem = gl.allocate_shared_memory(gl.int32, [2, 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    verdict_smem = gl.allocate_shared_memory(gl.int32, [4, 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    note_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    note_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    tail_clear = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    may_issue = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)  # each consumer has its own queries
        mbarrier.init(note_full.index(i), count=1)
        mbarrier.init(note_empty.index(i), count=2)
        mbarrier.init(may_issue.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    mbarrier.init(tail_clear, count=2)
    fence_async_shared()

    buffers = (q_smem, k_smem, v_smem, note_smem, verdict_smem)
    barriers = (
        q_full, q_empty, k_full, k_empty, v_full, v_empty, note_full, note_empty, tail_clear, may_issue,
    )  # fmt: skip
    arrays = (
        query_starts_ptr, first_rows_ptr, shared_first_rows_ptr, shared_lens_ptr, context_lens_ptr,
        counter_ptr,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (consume, (0, buffers, barriers, out_ptr, out_token_stride_8, out_head_stride_8, scale_log2,
                       HEADS, HEAD_DIM, BLOCK_N, BLOCK_D, STAGES, TILES_PER_LOOK)),
            (consume, (1, buffers, barriers, out_ptr, out_token_stride_8, out_head_stride_8, scale_log2,
                       HEADS, HEAD_DIM, BLOCK_N, BLOCK_D, STAGES, TILES_PER_LOOK)),
            (_produce, (q_desc, kv_desc, buffers, barriers, arrays, num_sequences, kv_heads, l2_tokens,
                        HEADS, SLOTS, TOKENS_PER_ROW, BLOCK_N, STAGES, TILES_PER_LOOK)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
