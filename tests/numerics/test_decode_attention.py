"""Decode attention against the oracle: ragged batches, edges of rows, whole and divided sequences."""

from __future__ import annotations

import pytest
import torch

from kernels.decode_plan import count_teams
from tests.numerics import oracle
from tests.numerics.cases import (
    DTYPES,
    AttentionShape,
    Backend,
    Context,
    assert_close,
    int32,
    make_context,
    make_workspace,
    poisoned_like,
    random,
    strided,
)

SHAPES = [
    AttentionShape(query_heads=4, kv_heads=4, head_dim=16, tokens_per_row=16),
    AttentionShape(query_heads=9, kv_heads=3, head_dim=64, tokens_per_row=16),
    AttentionShape(query_heads=8, kv_heads=2, head_dim=128, tokens_per_row=32),
    AttentionShape(query_heads=6, kv_heads=2, head_dim=96, tokens_per_row=24),
    AttentionShape(query_heads=3, kv_heads=1, head_dim=256, tokens_per_row=48),
    AttentionShape(query_heads=14, kv_heads=2, head_dim=64, tokens_per_row=128),
    AttentionShape(query_heads=4, kv_heads=1, head_dim=32, tokens_per_row=5),
    AttentionShape(query_heads=3, kv_heads=1, head_dim=8, tokens_per_row=1),
]


def check(backend: Backend, shape: AttentionShape, lengths: list[int], dtype: torch.dtype) -> None:
    check_context(backend, shape, make_context(shape, lengths, dtype, backend.device), lengths)


def check_context(backend: Backend, shape: AttentionShape, context: Context, lengths: list[int]) -> None:
    """`lengths`: of the context's sequences, or 0 for those that are left out."""
    dtype = context.kv.dtype
    q = strided(random(len(lengths), shape.query_heads, shape.head_dim, dtype=dtype, device=backend.device))
    workspace = make_workspace(backend, shape)
    context_lens = int32(lengths, backend.device)
    backend.kernels.decode_plan(context.kv, context_lens, workspace)
    for _ in range(2):  # as two layers, which share a plan
        out = poisoned_like(q)
        scale = oracle.default_scale(shape.head_dim)
        result = backend.kernels.decode_attention(
            q, context.kv, *context.places, context_lens, scale, workspace, out
        )
        assert result is out
        assert_attends(q, context, out, lengths)


def assert_attends(q: torch.Tensor, context: Context, out: torch.Tensor, lengths: list[int]) -> None:
    """Rows of `out` are the attention of their sequences, padding (length 0) aside."""
    scale = oracle.default_scale(q.shape[-1])
    for index, length in enumerate(lengths):
        if length:
            row = slice(index, index + 1)
            k, v = context.keys[index][:length], context.values[index][:length]
            assert_close(out[row], oracle.attention(q[row], k, v, scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_batch(backend: Backend, shape: AttentionShape, dtype: torch.dtype) -> None:
    check(backend, shape, shape.lengths(), dtype)


@pytest.mark.parametrize("length", [1, 15, 16, 17])
def test_single_sequence(backend: Backend, length: int) -> None:
    check(backend, SHAPES[1], [length], torch.float32)


@pytest.mark.parametrize("tokens_per_row", [64, 20], ids=["even", "uneven"])
@pytest.mark.parametrize(
    "lengths",
    [
        [1061, 3, 512, 257],  # one long sequence over many spans, others within one
        [640] * 4,  # spans that begin and end within a sequence
        [2051],
        [17, 0, 1500, 0, 0, 64],  # padding between sequences, and before the end
        [0, 0, 700, 1],
        [900, 1, 1, 1],
    ],
    ids=str,
)
def test_divided_sequences(backend: Backend, lengths: list[int], tokens_per_row: int) -> None:
    shape = AttentionShape(query_heads=6, kv_heads=2, head_dim=16, tokens_per_row=tokens_per_row)
    check(backend, shape, lengths, torch.float32)


def test_more_parts_than_are_joined_at_once(backend: Backend) -> None:
    """Sixteen teams of one head share a sequence; of a group of 16 with 128 dims, 4 parts fit a block."""
    shape = AttentionShape(query_heads=16, kv_heads=1, head_dim=128, tokens_per_row=64)
    check(backend, shape, [64 * 18 + 3], torch.float32)


def test_more_sequences_than_one_block_of_the_plan(backend: Backend) -> None:
    shape = AttentionShape(query_heads=2, kv_heads=1, head_dim=8, tokens_per_row=16)
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(0, 40, (300,), generator=generator).tolist()
    check(backend, shape, lengths, torch.float32)


def test_padding_alone(backend: Backend) -> None:
    check(backend, SHAPES[0], [0, 0, 0], torch.float32)


def test_large_scores_do_not_overflow(backend: Backend) -> None:
    shape = SHAPES[0]
    lengths = [40, 7]
    context = make_context(shape, lengths, torch.float32, backend.device)
    q = random(2, shape.query_heads, shape.head_dim, dtype=torch.float32, device=backend.device) * 300
    out, workspace, lens = poisoned_like(q), make_workspace(backend, shape), int32(lengths, backend.device)
    backend.kernels.decode_plan(context.kv, lens, workspace)
    backend.kernels.decode_attention(q, context.kv, *context.places, lens, 1.0, workspace, out)
    for index in range(2):
        expected = oracle.attention(q[index : index + 1], context.keys[index], context.values[index], 1.0)
        torch.testing.assert_close(out[index : index + 1].double().cpu(), expected, rtol=1e-3, atol=1e-3)


def test_empty_batch(backend: Backend) -> None:
    context = make_context(SHAPES[0], [4], torch.float32, backend.device)
    q = torch.empty(0, 4, 16, device=backend.device)
    none = torch.empty(0, dtype=torch.int64, device=backend.device)
    out, workspace = torch.empty_like(q), make_workspace(backend, SHAPES[0])
    backend.kernels.decode_plan(context.kv, none.int(), workspace)
    places = none, none, none.int()
    result = backend.kernels.decode_attention(q, context.kv, *places, none.int(), 1.0, workspace, out)
    assert result.shape == (0, 4, 16)


@pytest.mark.parametrize(
    ("kv_heads", "sms", "teams"),
    [
        (8, 132, 33),  # 264 programs, two an SM
        (1, 132, 264),
        (3, 132, 88),
        (40, 132, 13),  # 6 would leave a tenth of the SMs idle; 13 are two waves
        (1000, 132, 1),
    ],
)
def test_count_teams(kv_heads: int, sms: int, teams: int) -> None:
    assert count_teams(kv_heads, sms) == teams


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_llama_8b_ragged(backend: Backend, dtype: torch.dtype) -> None:
    shape = AttentionShape(query_heads=32, kv_heads=8, head_dim=128, tokens_per_row=128)
    check(backend, shape, [1, 127, 128, 129, 1000, 4096, 0, 16384], dtype)


@pytest.mark.gpu
def test_a_graph_follows_the_lengths(device: torch.device) -> None:
    """Captured once, replayed with others: lengths of 0 to the rows' limit, in a poisoned workspace."""
    from kernels import triton_backend

    shape = AttentionShape(query_heads=8, kv_heads=2, head_dim=64, tokens_per_row=64)
    longest = [3000, 40, 700, 1, 129, 2500, 64, 1000]
    context = make_context(shape, longest, torch.bfloat16, device)
    backend = Backend(triton_backend, device)
    q = random(len(longest), 8, 64, dtype=torch.bfloat16, device=device)
    lens, workspace, out = int32(longest, device), make_workspace(backend, shape), torch.empty_like(q)

    def step() -> None:
        triton_backend.decode_plan(context.kv, lens, workspace)
        for _ in range(2):
            out.fill_(float("nan"))
            triton_backend.decode_attention(
                q, context.kv, *context.places, lens, oracle.default_scale(64), workspace, out
            )

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for lengths in (longest, [1, 40, 0, 1, 0, 0, 0, 0], [0] * 8, [2999, 1, 1, 1, 1, 1, 1, 1], longest):
        lens.copy_(int32(lengths, device))
        workspace.fill_(float("nan"))
        graph.replay()
        assert_attends(q, context, out, lengths)
