"""Decode attention against the oracle: ragged batches, edges of rows, one split and several."""

from __future__ import annotations

import pytest
import torch

from kernels.decode_attention import plan_splits
from tests.numerics import oracle
from tests.numerics.cases import (
    DTYPES,
    AttentionShape,
    Backend,
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
    AttentionShape(query_heads=3, kv_heads=1, head_dim=8, tokens_per_row=1),
]


def check(backend: Backend, shape: AttentionShape, lengths: list[int], dtype: torch.dtype) -> None:
    context = make_context(shape, lengths, dtype, backend.device)
    q = strided(random(len(lengths), shape.query_heads, shape.head_dim, dtype=dtype, device=backend.device))
    scale = oracle.default_scale(shape.head_dim)
    out = poisoned_like(q)
    context_lens = int32(lengths, backend.device)
    result = backend.kernels.decode_attention(
        q, context.kv, context.first_rows, context_lens, max(lengths), scale, out
    )
    assert result is out
    for index in range(len(lengths)):
        expected = oracle.attention(q[index : index + 1], context.keys[index], context.values[index], scale)
        assert_close(out[index : index + 1], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_batch(backend: Backend, shape: AttentionShape, dtype: torch.dtype) -> None:
    check(backend, shape, shape.lengths(), dtype)


@pytest.mark.parametrize("length", [1, 15, 16, 17])
def test_single_sequence(backend: Backend, length: int) -> None:
    check(backend, SHAPES[1], [length], torch.float32)


@pytest.mark.parametrize("tokens_per_row", [64, 20], ids=["even", "uneven"])
def test_several_splits_beside_a_short_sequence(backend: Backend, tokens_per_row: int) -> None:
    shape = AttentionShape(query_heads=3, kv_heads=1, head_dim=16, tokens_per_row=tokens_per_row)
    lengths = [1061, 3, 512, 257]
    assert plan_splits(len(lengths), max(lengths), 132) > 1
    assert plan_splits(len(lengths), max(lengths), 1) == 1
    check(backend, shape, lengths, torch.float32)


def test_more_splits_than_one_block_of_the_reduction(backend: Backend) -> None:
    shape = AttentionShape(query_heads=2, kv_heads=1, head_dim=16, tokens_per_row=128)
    length = 256 * 17 + 3
    check(backend, shape, [length], torch.float32)


def test_large_scores_do_not_overflow(backend: Backend) -> None:
    shape = SHAPES[0]
    lengths = [40, 7]
    context = make_context(shape, lengths, torch.float32, backend.device)
    q = random(2, shape.query_heads, shape.head_dim, dtype=torch.float32, device=backend.device) * 300
    out = poisoned_like(q)
    backend.kernels.decode_attention(
        q, context.kv, context.first_rows, int32(lengths, backend.device), 40, 1.0, out
    )
    for index in range(2):
        expected = oracle.attention(q[index : index + 1], context.keys[index], context.values[index], 1.0)
        torch.testing.assert_close(out[index : index + 1].double().cpu(), expected, rtol=1e-3, atol=1e-3)


def test_empty_batch(backend: Backend) -> None:
    context = make_context(SHAPES[0], [4], torch.float32, backend.device)
    q = torch.empty(0, 4, 16, device=backend.device)
    none = torch.empty(0, dtype=torch.int64, device=backend.device)
    out = torch.empty_like(q)
    assert backend.kernels.decode_attention(q, context.kv, none, none.int(), 1, 1.0, out).shape == (0, 4, 16)


@pytest.mark.parametrize(
    ("heads", "context", "sms", "splits"),
    [
        (8, 131072, 132, 66),  # one long sequence: fill the GPU
        (64, 4096, 132, 9),
        (512, 8192, 132, 2),  # enough programs already; two parts of 4096 keep them even
        (2048, 1024, 132, 1),
        (8, 300, 132, 1),  # too short to split
        (2048, 131072, 132, 8),  # the partial results stay bounded
        (100_000, 131072, 132, 1),
    ],
)
def test_plan_splits(heads: int, context: int, sms: int, splits: int) -> None:
    assert plan_splits(heads, context, sms) == splits


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_llama_8b_ragged(backend: Backend, dtype: torch.dtype) -> None:
    shape = AttentionShape(query_heads=32, kv_heads=8, head_dim=128, tokens_per_row=128)
    check(backend, shape, [1, 127, 128, 129, 1000, 4096, 16384], dtype)
