"""What perfect sharing computes once, and the floors that follow."""

from __future__ import annotations

import pytest

from cluster.bench import floor
from cluster.bench.named import ChatPlan, named_workload
from cluster.bench.sharing import reuse_of
from cluster.bench.workload import PlannedRequest, RandomPlan, Workload

TINY = floor.ModelShape(hidden=4, intermediate=8, layers=2, heads=2, kv_heads=1, head_dim=2, vocab=10)
CEILING = floor.Ceiling("test", bytes_per_s=1000.0, flop_per_s=10_000.0)
WEIGHTS = 656  # bytes; see test_bench_summary.py
KV = 16  # bytes a token


def _parts(*parts: tuple[str, int]) -> PlannedRequest:
    return PlannedRequest(0.0, sum(length for _, length in parts), 1, parts)


def test_a_prefix_is_shared_as_far_as_the_parts_are_equal() -> None:
    requests = (
        _parts(("system", 10), ("user", 5), ("a", 3)),
        _parts(("system", 10), ("user", 5), ("b", 3)),
        _parts(("system", 10), ("other", 5), ("a", 3)),  # equal again behind a difference: not shared
        _parts(("system", 4), ("user", 5)),  # its first four tokens are the prefix's
        _parts(("fresh", 7)),
    )
    cached = [reuse.cached for reuse in reuse_of(Workload("w", requests, 0))]
    assert cached == [0, 15, 10, 4, 0]


def test_the_last_token_of_a_prompt_is_computed_always() -> None:
    twice = (_parts(("a", 8)), _parts(("a", 8)))
    assert [reuse.cached for reuse in reuse_of(Workload("w", twice, 0))] == [0, 7]


def test_a_turn_finds_all_but_the_last_token_that_was_said() -> None:
    workload = ChatPlan(num_chats=2, num_turns=3, turn_tokens=16, seed=0, vocab_size=100).workload("w")
    reuses = reuse_of(workload)
    assert [reuse.cached for reuse in reuses] == [0, 0, 15, 15, 31, 31]
    assert [reuse.common for reuse in reuses] == [0] * 6
    assert [(reuse.turns, reuse.passes) for reuse in reuses[::2]] == [(1, 2), (2, 4), (3, 6)]


def test_the_floor_of_a_shared_prefix_computes_and_reads_it_once() -> None:
    workload = RandomPlan(3, 2, 3, prefix_len=4).workload("w")
    bound = floor.floor_of(workload, TINY, CEILING)
    first_flop = 2 * (6 * 288 + 40) + 4 * 2 * 2 * 2 * 21
    later_flop = 2 * (2 * 288 + 40) + 4 * 2 * 2 * 2 * (5 + 6)
    decode_flop = 2 * 2 * (288 + 40) + 4 * 2 * 2 * 2 * (7 + 8)
    assert bound.flop == first_flop + 2 * later_flop + 3 * decode_flop
    assert bound.read_bytes == 3 * WEIGHTS + (7 + 8) * KV + 2 * (3 + 4) * KV


def test_the_floor_of_a_session_is_its_turns_one_after_another() -> None:
    turns = (PlannedRequest(0.5, 3, 2), PlannedRequest(0.0, 9, 2, follows=0, think_s=2.0))
    bound = floor.floor_of(Workload("w", turns, 0), TINY, CEILING)
    # The second turn computes 5 of its 9 tokens, behind the 4 whose KV it reads.
    first_flop = 2 * (3 * 288 + 40) + 4 * 2 * 2 * 2 * 6
    second_flop = 2 * (5 * 288 + 40) + 4 * 2 * 2 * 2 * (5 + 6 + 7 + 8 + 9)
    decode_flop = 2 * 2 * (288 + 40) + 4 * 2 * 2 * 2 * (4 + 10)
    assert bound.flop == first_flop + second_flop + decode_flop
    assert bound.read_bytes == 4 * WEIGHTS + (4 + 4 + 10) * KV
    alone_s = (2 * WEIGHTS + 4 * KV) / 1000 + (2 * WEIGHTS + (4 + 10) * KV) / 1000
    assert bound.floor_s == pytest.approx(0.5 + 2.0 + alone_s)


@pytest.mark.parametrize("name", ["shared-256x4096+128+64", "chats-64x10x1024"])
def test_sharing_lowers_the_floor(name: str) -> None:
    shared = named_workload(name)
    apart = Workload(
        name,
        tuple(PlannedRequest(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in shared.requests),
        shared.seed,
    )
    ceiling = floor.CEILINGS["h100"]
    shape = floor.ModelShape(4096, 14336, 32, 32, 8, 128, 128256)
    assert floor.floor_of(shared, shape, ceiling).flop < 0.5 * floor.floor_of(apart, shape, ceiling).flop
