"""The prefill kernel of Hopper GPUs: what it takes, what it compiles to, and its results on such a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from kernels.prefill_hopper import hopper_pool, variant_for
from tests.numerics.cases import AttentionShape, Backend
from tests.numerics.test_prefill_attention import check

# Groups that are and are not powers of two; T of one tile, of several, and of 64-token tiles alone.
SHAPES = [
    AttentionShape(query_heads=32, kv_heads=8, head_dim=128, tokens_per_row=128),
    AttentionShape(query_heads=14, kv_heads=2, head_dim=128, tokens_per_row=256),
    AttentionShape(query_heads=4, kv_heads=4, head_dim=64, tokens_per_row=192),
    AttentionShape(query_heads=64, kv_heads=1, head_dim=64, tokens_per_row=128),
    AttentionShape(query_heads=9, kv_heads=3, head_dim=96, tokens_per_row=64),
    AttentionShape(query_heads=12, kv_heads=2, head_dim=256, tokens_per_row=64),
]
HALF_DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("dtype", "head_dim", "tokens_per_row"),
    [
        (torch.float32, 128, 128),
        (torch.bfloat16, 80, 128),
        (torch.bfloat16, 32, 128),
        (torch.bfloat16, 128, 48),
        (torch.float16, 256, 96),
    ],
)
def test_other_inputs_have_the_portable_kernel(
    dtype: torch.dtype, head_dim: int, tokens_per_row: int
) -> None:
    assert variant_for(dtype, 8, head_dim, tokens_per_row, 2) is None


def test_a_cpu_has_the_portable_kernel() -> None:
    q = torch.zeros(1, 8, 128, dtype=torch.bfloat16)
    assert hopper_pool(q, torch.zeros(2, 2, 128, 2, 128, dtype=torch.bfloat16), q) is None


@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "heads", "slots"),
    [(32, 8, 4, 1), (28, 4, 1, 7), (12, 2, 2, 3), (8, 8, 1, 1), (128, 1, 64, 2)],
)
def test_tiles_share_the_largest_power_of_two_in_a_group(
    query_heads: int, kv_heads: int, heads: int, slots: int
) -> None:
    variant = variant_for(torch.bfloat16, query_heads, 128, 128, kv_heads)
    assert variant is not None
    assert (variant.heads, variant.slots) == (heads, slots)


@pytest.mark.parametrize(
    ("head_dim", "most_spills"),
    [(64, 0), (96, 0), (128, 0), (256, 64)],  # 256: scalars of the set-up; a tile would be hundreds
)
def test_compiles_to_wgmma_and_tma(head_dim: int, most_spills: int) -> None:
    program = [sys.executable, "-m", "tests.numerics.prefill_assembly", str(head_dim), "8", "2", "128"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=240)
    assert run.returncode == 0, run.stderr
    counts = json.loads(run.stdout)
    assert counts["HGMMA"] > 0
    assert counts["UTMALDG"] > 0
    assert counts["LDL"] + counts["STL"] <= most_spills, counts


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("on_hopper")
def test_ragged_pieces(backend: Backend, shape: AttentionShape, dtype: torch.dtype) -> None:
    t = shape.tokens_per_row
    pieces = [
        (t + 1, 0),
        (1, 2 * t + 3),
        (0, 9),
        (t - 1, 7),
        (1, 0),
        (3, t),
        (t, t - 1),
        (5, 59),
        (300, 3 * t),
    ]
    check(backend, shape, pieces, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 511, 1000])
@pytest.mark.usefixtures("on_hopper")
def test_whole_prompts_around_the_edges_of_tiles(backend: Backend, queries: int) -> None:
    check(backend, SHAPES[0], [(queries, 0)], torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("cached", [1, 63, 64, 127, 128, 129, 1023])
@pytest.mark.usefixtures("on_hopper")
def test_cached_prefixes(backend: Backend, cached: int) -> None:
    check(backend, SHAPES[0], [(70, cached), (128, cached)], torch.float16)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
def test_more_launches_than_counters(backend: Backend) -> None:
    for _ in range(70):  # a counter left above zero would skip the first tiles of its next launch
        check(backend, SHAPES[2], [(40, 0), (3, 30)], torch.float16)
