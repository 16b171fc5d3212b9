"""The ranking of TP groups."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cluster.router import STALE_S, GroupLoad, rank_groups

LOADS = st.lists(
    st.builds(
        GroupLoad,
        queue_len=st.integers(0, 50),
        num_running=st.none() | st.integers(0, 50),
        num_waiting=st.none() | st.integers(0, 50),
        kv_usage=st.floats(0, 1),
        age_s=st.floats(0, 2 * STALE_S),
    ),
    max_size=8,
)


def fresh(running: int, waiting: int = 0, queue_len: int = 0, kv_usage: float = 0.0) -> GroupLoad:
    return GroupLoad(queue_len, running, waiting, kv_usage, age_s=0.1)


def first(*loads: GroupLoad, seed: int = 0) -> int:
    return rank_groups(loads, random.Random(seed))[0]


@given(LOADS, st.integers())
def test_every_group_is_ranked_once(loads: list[GroupLoad], seed: int) -> None:
    assert sorted(rank_groups(loads, random.Random(seed))) == list(range(len(loads)))


@given(st.integers())
def test_least_work_comes_first(seed: int) -> None:
    loads = [fresh(9), fresh(2, 1), fresh(4)]
    assert rank_groups(loads, random.Random(seed)) == [1, 2, 0]


def test_requests_that_are_still_on_their_way_count() -> None:
    assert first(fresh(1, queue_len=6), fresh(3, queue_len=3)) == 1


def test_ties_go_to_the_shorter_queue_then_to_free_memory() -> None:
    assert first(fresh(4, 4), fresh(8, 0)) == 1
    assert first(fresh(5, kv_usage=0.9), fresh(5, kv_usage=0.2)) == 1


def test_equals_are_drawn() -> None:
    drawn = Counter(first(fresh(1), fresh(1), fresh(1), seed=seed) for seed in range(300))
    assert min(drawn[group] for group in range(3)) > 60


def test_one_stale_group_makes_it_power_of_two() -> None:
    """The full group loses every pair it is in; with facts for all it would never be drawn first."""
    old = GroupLoad(0, 0, 0, age_s=STALE_S + 1)
    loads = [old, fresh(0, queue_len=5), fresh(0, queue_len=9)]
    drawn = Counter(rank_groups(loads, random.Random(seed))[0] for seed in range(300))
    assert drawn[2] == 0
    assert drawn[0] > 120
    assert drawn[1] > 60


def test_missing_facts_are_not_zero_load() -> None:
    assert not GroupLoad(0).is_fresh
    assert not GroupLoad(0, None, 3, age_s=0.0).is_fresh
    assert fresh(0).is_fresh
