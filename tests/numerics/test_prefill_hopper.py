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


# Some scalars are spilled. A consumer's scores or weights would be 32 stores or more, its accumulator of 256
# dims 128.
@pytest.mark.parametrize(("head_dim", "most_stores"), [(64, 31), (96, 31), (128, 31), (256, 63)])
def test_compiles_to_wgmma_and_tma(head_dim: int, most_stores: int) -> None:
    program = [sys.executable, "-m", "tests.numerics.prefill_assembly", str(head_dim), "8", "2", "128"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=240)
    assert run.returncode == 0, run.stderr
    counts = json.loads(run.stdout)
    assert counts["HGMMA"] > 0
    assert counts["UTMALDG"] > 0
    assert counts["STL"] <= most_stores, counts
    assert counts["LDL"] <= 100, counts


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


# Weights of the tiles between two looks at the largest score may be beyond any float: the first and the last
# of those tiles, both, where the looks are, and before any.
@pytest.mark.gpu
@pytest.mark.parametrize("factor", [10.0, 3000.0])
@pytest.mark.parametrize("tokens", [(0,), (130,), (300,), (2300,), (2310, 2500), (600, 4700)], ids=str)
@pytest.mark.usefixtures("on_hopper")
def test_scores_that_jump_beyond_what_a_float_holds(
    backend: Backend, tokens: tuple[int, ...], factor: float
) -> None:
    check(backend, SHAPES[0], [(17, 5000)], torch.bfloat16, large_keys=dict.fromkeys(tokens, factor))


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
def test_scores_that_jump_in_float16(backend: Backend) -> None:
    check(backend, SHAPES[0], [(17, 5000)], torch.float16, large_keys={300: 10.0, 2500: 100.0})


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [1, 3, 300])  # programs with a tile, with two and more
@pytest.mark.usefixtures("on_hopper")
def test_tiles_that_are_computed_again_between_others(backend: Backend, queries: int) -> None:
    large = {700: 100.0, 2200: 300.0, 2461: 3000.0}
    check(backend, SHAPES[3], [(queries, 2400), (2, 50), (queries, 2400)], torch.bfloat16, large_keys=large)


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
def test_more_launches_than_counters(backend: Backend) -> None:
    for _ in range(70):  # a counter left above zero would skip the first tiles of its next launch
        check(backend, SHAPES[2], [(40, 0), (3, 30)], torch.float16)
