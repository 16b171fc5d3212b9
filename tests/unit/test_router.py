"""The ranking of TP groups, and the record of what was sent where."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.prefix_record import BLOCK_TOKENS, PrefixRecord, chain_of, home_of, key_of
from cluster.ranking import CROWD_S, STALE_S, Ask, GroupLoad, cost_s, door_of, rank_groups, routing_stats
from engine.request_wire import EngineAddress
from tests.unit.samples import snapshot

LOADS = st.lists(
    st.builds(
        GroupLoad,
        queue_len=st.integers(0, 50),
        num_open=st.none() | st.integers(0, 50),
        wait_s=st.floats(0, 3),
        oldest_wait_s=st.floats(0, 3),
        token_s=st.floats(0, 0.01),
        pressure=st.floats(0, 1),
        weight=st.floats(0.1, 1),
        age_s=st.floats(0, 2 * STALE_S),
    ),
    min_size=1,
    max_size=8,
)
FRESH = LOADS.map(lambda loads: [replace(load, num_open=load.num_open or 0, age_s=0.1) for load in loads])


def fresh(num_open: int, queue_len: int = 0, **facts: float) -> GroupLoad:
    return GroupLoad(queue_len, num_open, age_s=0.1, token_s=1e-3, **facts)  # type: ignore[misc]


def ask(prompt: int = 100, cached: Sequence[int] = (0,) * 8, **facts: float) -> Ask:
    return Ask(prompt, cached, **facts)  # type: ignore[arg-type]


def first(*loads: GroupLoad, seed: int = 0, of: Ask | None = None) -> int:
    return rank_groups(loads, of or ask(), random.Random(seed))[0]


@settings(deadline=None)
@given(LOADS, st.integers())
def test_every_group_is_ranked_once_and_the_same_for_a_seed(loads: list[GroupLoad], seed: int) -> None:
    ranked = rank_groups(loads, ask(), random.Random(seed))
    assert sorted(ranked) == list(range(len(loads)))
    assert ranked == rank_groups(loads, ask(), random.Random(seed))


@settings(deadline=None)
@given(FRESH, st.integers(0, 7), st.integers(), st.floats(0, 30), st.integers(1, 20), st.data())
def test_a_group_with_less_slack_more_work_or_less_room_is_ranked_no_better(
    loads: list[GroupLoad], at: int, seed: int, longer_s: float, more: int, data: st.DataObject
) -> None:
    at %= len(loads)
    load = loads[at]
    changes = {
        "wait_s": load.wait_s + longer_s,
        "oldest_wait_s": load.oldest_wait_s + longer_s,
        "queue_len": load.queue_len + more,
        "unseen_tokens": load.unseen_tokens + 100 * more,
        "pressure": min(1.0, load.pressure + 0.1),
        "weight": load.weight / 2,
    }
    what = data.draw(st.sampled_from(sorted(changes)))
    worse = [*loads]
    worse[at] = replace(load, **{what: changes[what]})  # type: ignore[arg-type]
    before = rank_groups(loads, ask(), random.Random(seed)).index(at)
    assert rank_groups(worse, ask(), random.Random(seed)).index(at) >= before


@settings(deadline=None)
@given(FRESH, st.integers(0, 7), st.integers(0, 2000), st.integers(0, 2000))
def test_what_is_cached_makes_a_group_no_worse(
    loads: list[GroupLoad], at: int, prompt: int, cached: int
) -> None:
    load = loads[at % len(loads)]
    assert cost_s(load, ask(prompt), min(cached, prompt)) <= cost_s(load, ask(prompt), 0)


@settings(deadline=None, max_examples=30)
@given(FRESH, st.integers())
def test_no_group_is_starved(loads: list[GroupLoad], seed: int) -> None:
    """However bad it looks: while others get all requests, they look worse and worse."""
    rng, chosen = random.Random(seed), Counter[int]()
    dearest = max(cost_s(load, ask(), 0) for load in loads)
    cheapest_s = CROWD_S  # what one request more makes a group dearer, at least
    for _ in range(int(dearest / cheapest_s) * len(loads) + 8 * len(loads)):
        at = rank_groups(loads, ask(), rng)[0]
        chosen[at] += 1
        loads[at] = replace(loads[at], queue_len=max(loads[at].queue_len, loads[at].num_open or 0) + 1)
        if len(chosen) == len(loads):
            return
    assert len(chosen) == len(loads)


def test_the_rule_of_affinity() -> None:
    """1,000 tokens cached, at 1 ms each, against queues of some length."""
    for queue_s, expected in ((0.0, 0), (0.9, 0), (1.1, 1)):
        loads = [fresh(0, wait_s=queue_s, ttft_slo_s=10.0), fresh(0, ttft_slo_s=10.0)]
        assert first(*loads, of=ask(2000, (1000, 0))) == expected


def test_slack_that_is_gone_costs_more_than_work() -> None:
    """The cached group would be 0.4 s late: with a promise of its own the request goes where it is not."""
    loads = [fresh(0, wait_s=1.4, ttft_slo_s=10.0), fresh(0, ttft_slo_s=10.0)]
    of = ask(2000, (2000, 100), ttft_slo_s=10.0)
    assert first(*loads, of=of) == 0
    assert first(*loads, of=replace(of, ttft_slo_s=1.9)) == 0, "late at both, and later at the other"
    loads[1] = replace(loads[1], token_s=0.9e-3)
    assert first(*loads, of=replace(of, ttft_slo_s=1.0)) == 0
    assert first(*loads, of=replace(of, cached_tokens=(2000, 600), ttft_slo_s=1.3)) == 1


def test_requests_that_are_still_on_their_way_count() -> None:
    assert first(fresh(1, queue_len=6), fresh(3, queue_len=3)) == 1
    assert first(fresh(1, unseen_tokens=500), fresh(3)) == 1


def test_a_group_without_room_comes_later() -> None:
    assert first(fresh(5, pressure=0.95), fresh(5, pressure=0.2)) == 1
    assert first(fresh(5, pressure=0.5), fresh(6, pressure=0.0)) == 0, "half full is no reason"


def test_what_a_group_believes_of_its_speed_keeps_no_request_from_it_for_ever() -> None:
    """It learns its speed from prompts: without any it would believe so until it ends."""
    lost = GroupLoad(0, 0, age_s=0.1, token_s=4e23)
    assert first(lost, fresh(2)) == 1
    assert first(lost, fresh(400, wait_s=4.0)) == 0
    assert first(lost, fresh(400, wait_s=4.0), fresh(400, wait_s=4.0)) == 0
    twice = GroupLoad(0, 0, age_s=0.1, token_s=2e-3)
    assert cost_s(twice, ask(), 0) > cost_s(fresh(0), ask(), 0), "what is only slower counts as it is"


def test_equals_are_drawn_unless_one_is_home() -> None:
    loads = [fresh(1), fresh(1), fresh(1)]
    drawn = Counter(first(*loads, seed=seed) for seed in range(300))
    assert min(drawn[group] for group in range(3)) > 60
    assert {first(*loads, seed=seed, of=ask(home=2)) for seed in range(50)} == {2}


def test_without_fresh_facts_it_is_power_of_two() -> None:
    loads = [GroupLoad(0), GroupLoad(5, 5, age_s=STALE_S + 1), GroupLoad(9)]
    drawn = Counter(first(*loads, seed=seed) for seed in range(300))
    assert drawn[2] == 0
    assert drawn[0] > 120
    assert drawn[1] > 60


def test_a_stale_group_among_fresh_ones_gets_requests_only_while_it_has_fewer() -> None:
    assert first(GroupLoad(0), fresh(0, queue_len=3)) == 0
    assert first(GroupLoad(3), fresh(0, queue_len=3)) == 1
    loads = [GroupLoad(9), fresh(0, queue_len=1), fresh(0, queue_len=4)]
    assert {first(*loads, seed=seed) for seed in range(50)} == {1}, "affinity is not lost for all"


def test_what_a_group_pushes() -> None:
    door = EngineAddress("tcp://10.0.0.1:7000", b"secret")
    stats = routing_stats(snapshot("a"), 2.0, door)
    assert door_of(stats) == door
    assert door_of({}) is None
    assert stats["num_open"] == 9
    assert stats["pressure"] == 0.2
    assert stats["weight"] == 1.0
    assert all(isinstance(value, int | float) for name, value in stats.items() if name != "door")


def test_missing_facts_are_not_zero_load() -> None:
    assert not GroupLoad(0).is_fresh
    assert not GroupLoad(0, 3).is_fresh
    assert fresh(0).is_fresh


def _chain(name: str, blocks: int) -> list[bytes]:
    return chain_of(random.Random(name).choices(range(1000), k=blocks * BLOCK_TOKENS), "")


def test_equal_beginnings_have_equal_hashes() -> None:
    tokens = list(range(1000))
    chain = chain_of(tokens, "salt")
    assert len(chain) == 1000 // BLOCK_TOKENS
    assert chain_of([*tokens[:200], 5, *tokens[201:]], "salt")[:3] == chain[:3]
    assert chain_of([*tokens[:190], 5, *tokens[191:]], "salt")[2:] != chain[2:]
    assert not set(chain_of(tokens, "other")) & set(chain)
    assert chain_of(tokens[: BLOCK_TOKENS - 1], "") == []


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(1, 12)), max_size=60))
def test_the_record_is_bounded_and_knows_no_more_than_was_sent(sent: list[tuple[int, int, int]]) -> None:
    record: PrefixRecord[int] = PrefixRecord(max_blocks=20)
    longest: Counter[tuple[int, int]] = Counter()
    for group, talk, blocks in sent:
        record.sent(group, _chain(str(talk), 12)[:blocks])
        longest[group, talk] = max(longest[group, talk], blocks)
        assert record.cached_tokens(group, _chain(str(talk), 12)) >= blocks * BLOCK_TOKENS
    assert len(record) <= 4 * 20
    for group in range(4):
        for talk in range(10):
            known = record.cached_tokens(group, _chain(str(talk), 12))
            assert known <= longest[group, talk] * BLOCK_TOKENS


def test_the_record_forgets_the_oldest_from_its_end_and_groups_that_are_gone() -> None:
    record: PrefixRecord[str] = PrefixRecord(max_blocks=10)
    old, new = _chain("old", 6), _chain("new", 6)
    record.sent("g", old)
    record.sent("g", new)
    assert record.cached_tokens("g", new) == 6 * BLOCK_TOKENS
    assert record.cached_tokens("g", old) == 4 * BLOCK_TOKENS
    record.limit("g", 3 * BLOCK_TOKENS)
    record.sent("g", new)
    assert len(record) == 3
    record.keep_only(["h"])
    assert len(record) == 0


def test_homes_are_spread_and_stay_when_a_group_goes() -> None:
    groups = [f"g{at}" for at in range(8)]
    homes = {number: home_of(key_of(str(number)), groups) for number in range(800)}
    counts = Counter(homes.values())
    assert min(counts.values()) > 60
    moved = sum(
        home is not None and groups[home] != groups[:-1][home_of(key_of(str(number)), groups[:-1]) or 0]
        for number, home in homes.items()
    )
    assert moved == counts[7], "only what was at the one that has gone"
    assert home_of(b"", []) is None
