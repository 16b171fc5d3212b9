"""Attention over prefixes that lie in other sequences' rows, against an oracle that copies them.

The rows that a sequence has of its own for such a prefix are NaN here, and unmapped in `sparse_pool`.
"""

from __future__ import annotations

import pytest
import torch

from kernels import triton_backend
from tests.numerics import oracle, test_decode_attention, test_prefill_attention
from tests.numerics.cases import (
    DTYPES,
    AttentionShape,
    Backend,
    Context,
    Sharing,
    int32,
    make_context,
    make_workspace,
    poisoned_like,
    random,
)
from tests.numerics.test_prefill_hopper import HALF_DTYPES
from tests.numerics.test_prefill_hopper import SHAPES as HOPPER_SHAPES

SHAPES = [
    AttentionShape(query_heads=2, kv_heads=1, head_dim=128, tokens_per_row=128),
    AttentionShape(query_heads=3, kv_heads=1, head_dim=64, tokens_per_row=48),
    AttentionShape(query_heads=4, kv_heads=2, head_dim=128, tokens_per_row=48),
    AttentionShape(query_heads=4, kv_heads=4, head_dim=16, tokens_per_row=16),
    AttentionShape(query_heads=4, kv_heads=1, head_dim=32, tokens_per_row=5),
    AttentionShape(query_heads=3, kv_heads=1, head_dim=8, tokens_per_row=1),
]
# Sequence 0 owns a prefix that many share, 5 one that two share; 1 and 7 share nothing.
SHARING: Sharing = {2: (0, 1), 3: (0, 6), 4: (0, 3), 6: (5, 3), 8: (5, 1)}


def lengths_for(t: int) -> list[int]:
    """Contexts for SHARING: one that ends a token behind its prefix, one with rows beyond it, a full row."""
    return [6 * t + 3, 1, 2 * t + 5, 6 * t + 1, 4 * t, 3 * t + 2, 4 * t + 7, 2 * t, t + 1]


def pieces_for(t: int) -> list[tuple[int, int]]:
    """(queries, cached tokens): `lengths_for(t)` as pieces of prompts, some of a token, some over rows."""
    queries = [0, 1, min(t + 5, 36), 1, min(t, 20), 3, min(t + 7, 36), min(2 * t, 50), 1]
    return [(new, length - new) for new, length in zip(queries, lengths_for(t), strict=True)]


def copied(context: Context) -> Context:
    """The same contexts without sharing: every sequence has all of its KV in its own rows."""
    kv = context.kv.clone()
    t = kv.shape[2]
    for row, owner, shared in zip(*(place.tolist() for place in context.places), strict=True):
        kv[row : row + shared // t] = context.kv[owner : owner + shared // t]
    none = torch.zeros_like(context.shared_lens)
    return Context(kv, context.first_rows, context.first_rows, none, context.keys, context.values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode(backend: Backend, shape: AttentionShape, dtype: torch.dtype) -> None:
    lengths = lengths_for(shape.tokens_per_row)
    context = make_context(shape, lengths, dtype, backend.device, SHARING)
    test_decode_attention.check_context(backend, shape, context, lengths)


def test_decode_without_the_owners(backend: Backend) -> None:
    """Their rows are read all the same: they are padding here, and may be a conversation that has ended."""
    lengths = lengths_for(SHAPES[1].tokens_per_row)
    context = make_context(SHAPES[1], lengths, torch.float32, backend.device, SHARING)
    lengths[0] = lengths[5] = 0
    test_decode_attention.check_context(backend, SHAPES[1], context, lengths)


@pytest.mark.parametrize(
    ("lengths", "sharing"),
    [
        ([1061, 1061], {1: (0, 16)}),  # spans begin and end inside a shared prefix, and where one ends
        ([64 * 9 + 3] * 5, dict.fromkeys(range(1, 5), (0, 9))),
        ([2000, 3, 1700, 65, 130], {3: (0, 1), 2: (0, 26), 4: (0, 2)}),
    ],
    ids=str,
)
def test_divided_decodes(backend: Backend, lengths: list[int], sharing: Sharing) -> None:
    shape = AttentionShape(query_heads=6, kv_heads=2, head_dim=16, tokens_per_row=64)
    context = make_context(shape, lengths, torch.float32, backend.device, sharing)
    test_decode_attention.check_context(backend, shape, context, lengths)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill(backend: Backend, shape: AttentionShape, dtype: torch.dtype) -> None:
    pieces = pieces_for(shape.tokens_per_row)
    test_prefill_attention.check(backend, shape, pieces, dtype, SHARING)


@pytest.mark.parametrize("queries", [1, 15, 16, 17, 50])
@pytest.mark.parametrize("shared", [1, 3])
def test_a_piece_that_begins_where_its_prefix_ends(backend: Backend, queries: int, shared: int) -> None:
    shape, t = SHAPES[3], SHAPES[3].tokens_per_row
    pieces = [(2, 3 * t + 1), (queries, shared * t)]
    test_prefill_attention.check(backend, shape, pieces, torch.float32, {1: (0, shared)})


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3], SHAPES[4]], ids=str)
def test_a_shared_prefix_gives_the_bits_of_a_copied_one(backend: Backend, shape: AttentionShape) -> None:
    """So that an answer does not depend on whose prompt was cached."""
    pieces, lengths = pieces_for(shape.tokens_per_row), lengths_for(shape.tokens_per_row)
    context = make_context(shape, lengths, torch.float16, backend.device, SHARING)
    num_queries = [queries for queries, _ in pieces]
    starts = int32([0, *torch.tensor(num_queries).cumsum(0).tolist()], backend.device)
    lens, workspace = int32(lengths, backend.device), make_workspace(backend, shape)
    new = sum(num_queries)
    q = random(new, shape.query_heads, shape.head_dim, dtype=torch.float16, device=backend.device)
    last, results = q[: len(lengths)], []
    backend.kernels.decode_plan(context.kv, lens, workspace)
    for way in (context, copied(context)):
        prefilled = backend.kernels.prefill_attention(
            q, way.kv, starts, *way.places, lens, max(num_queries), 0.1, poisoned_like(q)
        )
        decoded = backend.kernels.decode_attention(
            last, way.kv, *way.places, lens, 0.1, workspace, poisoned_like(last)
        )
        results.append(torch.cat([prefilled, decoded]))
    assert not results[0].isnan().any()
    assert torch.equal(*results)


LLAMA_8B = AttentionShape(query_heads=32, kv_heads=8, head_dim=128, tokens_per_row=128)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_llama_8b_decodes_behind_one_prompt(backend: Backend, dtype: torch.dtype) -> None:
    lengths = [4096, *(4096 + 1 + 3 * index for index in range(60)), 700]
    sharing = dict.fromkeys(range(1, 61), (0, 32))
    context = make_context(LLAMA_8B, lengths, dtype, backend.device, sharing)
    test_decode_attention.check_context(backend, LLAMA_8B, context, lengths)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_llama_8b_prefills_behind_one_prompt(backend: Backend, dtype: torch.dtype) -> None:
    pieces = [(1, 4095), (129, 4096), (1, 4096), (64, 4000), (128, 128)]
    sharing: Sharing = {1: (0, 32), 2: (0, 32), 3: (0, 31), 4: (0, 1)}
    test_prefill_attention.check(backend, LLAMA_8B, pieces, dtype, sharing)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("shape", HOPPER_SHAPES, ids=str)
@pytest.mark.usefixtures("on_hopper")
def test_prefill_on_hopper(backend: Backend, shape: AttentionShape, dtype: torch.dtype) -> None:
    pieces = pieces_for(shape.tokens_per_row)
    test_prefill_attention.check(backend, shape, pieces, dtype, SHARING)


@pytest.mark.gpu
def test_a_graph_follows_the_sharing(device: torch.device) -> None:
    """Captured while nothing was shared, replayed with prefixes that are."""
    shape = AttentionShape(query_heads=8, kv_heads=2, head_dim=128, tokens_per_row=64)
    lengths, backend = lengths_for(64), Backend(triton_backend, device)
    shared = make_context(shape, lengths, torch.bfloat16, device, SHARING)
    whole = copied(shared)
    kv, places = whole.kv.clone(), [place.clone() for place in whole.places]
    q = random(len(lengths), 8, 128, dtype=torch.bfloat16, device=device)
    lens, workspace, out = int32(lengths, device), make_workspace(backend, shape), torch.empty_like(q)

    def step() -> None:
        triton_backend.decode_plan(kv, lens, workspace)
        triton_backend.decode_attention(q, kv, *places, lens, oracle.default_scale(128), workspace, out)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for now in (shared, whole, shared):
        kv.copy_(now.kv)
        for place, new in zip(places, now.places, strict=True):
            place.copy_(new)
        out.fill_(float("nan"))
        graph.replay()
        test_decode_attention.assert_attends(q, now, out, lengths)
