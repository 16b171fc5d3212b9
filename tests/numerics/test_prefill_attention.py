"""Prefill attention against the oracle: cached prefixes, ragged pieces, edges of rows and of tiles."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from tests.numerics import oracle
from tests.numerics.cases import (
    DTYPES,
    AttentionShape,
    Backend,
    Sharing,
    assert_close,
    int32,
    make_context,
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
    AttentionShape(query_heads=4, kv_heads=1, head_dim=32, tokens_per_row=5),
]


def check(
    backend: Backend,
    shape: AttentionShape,
    pieces: list[tuple[int, int]],
    dtype: torch.dtype,
    sharing: Sharing | None = None,
    large_keys: Mapping[int, float] | None = None,
) -> None:
    """`pieces`: (queries, cached tokens) of each sequence; `large_keys` as `make_context` takes them."""
    lengths = [queries + cached for queries, cached in pieces]
    context = make_context(shape, lengths, dtype, backend.device, sharing, large_keys)
    starts = [0]
    for queries, _ in pieces:
        starts.append(starts[-1] + queries)
    q = strided(random(starts[-1], shape.query_heads, shape.head_dim, dtype=dtype, device=backend.device))
    scale = oracle.default_scale(shape.head_dim)
    out = poisoned_like(q)
    result = backend.kernels.prefill_attention(
        q,
        context.kv,
        int32(starts, backend.device),
        *context.places,
        int32(lengths, backend.device),
        max(queries for queries, _ in pieces),
        scale,
        out,
    )
    assert result is out
    for index in range(len(pieces)):
        span = slice(starts[index], starts[index + 1])
        assert_close(out[span], oracle.attention(q[span], context.keys[index], context.values[index], scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_pieces(backend: Backend, shape: AttentionShape, dtype: torch.dtype) -> None:
    t = shape.tokens_per_row
    check(backend, shape, [(t + 1, 0), (1, 2 * t + 3), (t - 1, 7), (1, 0), (3, t), (t, t - 1)], dtype)


@pytest.mark.parametrize("queries", [1, 15, 16, 17, 53])
def test_whole_prompt(backend: Backend, queries: int) -> None:
    check(backend, SHAPES[1], [(queries, 0)], torch.float32)


@pytest.mark.parametrize("cached", [1, 16, 31, 64, 97])
def test_cached_prefix(backend: Backend, cached: int) -> None:
    check(backend, SHAPES[1], [(21, cached)], torch.float32)


@pytest.mark.parametrize("factor", [30.0, 200.0])
@pytest.mark.parametrize("tokens", [(0,), (40,), (33, 70)], ids=str)
def test_scores_that_jump(backend: Backend, tokens: tuple[int, ...], factor: float) -> None:
    check(backend, SHAPES[1], [(13, 70)], torch.float32, large_keys=dict.fromkeys(tokens, factor))


def test_sequence_without_queries(backend: Backend) -> None:
    check(backend, SHAPES[0], [(3, 2), (0, 9), (5, 0)], torch.float32)


def test_no_queries_at_all(backend: Backend) -> None:
    context = make_context(SHAPES[0], [4], torch.float32, backend.device)
    q = torch.empty(0, 4, 16, device=backend.device)
    starts, none = int32([0], backend.device), int32([], backend.device)
    out = torch.empty_like(q)
    places = none.long(), none.long(), none
    result = backend.kernels.prefill_attention(q, context.kv, starts, *places, none, 0, 1.0, out)
    assert result.shape == (0, 4, 16)


def test_a_token_does_not_see_its_future(backend: Backend) -> None:
    shape = SHAPES[0]
    context = make_context(shape, [20], torch.float32, backend.device)
    q = random(20, shape.query_heads, shape.head_dim, dtype=torch.float32, device=backend.device)

    def run() -> torch.Tensor:
        return backend.kernels.prefill_attention(
            q,
            context.kv,
            int32([0, 20], backend.device),
            *context.places,
            int32([20], backend.device),
            20,
            0.25,
            poisoned_like(q),
        )

    before = run()
    row = int(context.first_rows[0])
    context.kv[row + 1, :, 1] += 1  # token 17
    after = run()
    assert torch.equal(before[:17], after[:17])
    assert not torch.equal(before[17:], after[17:])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_llama_8b_ragged(backend: Backend, dtype: torch.dtype) -> None:
    shape = AttentionShape(query_heads=32, kv_heads=8, head_dim=128, tokens_per_row=128)
    check(backend, shape, [(200, 0), (129, 1000), (1, 4095), (16, 16368), (64, 127)], dtype)
