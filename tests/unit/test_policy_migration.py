"""Which group sends a parked request where: only when it pays, within one model, and never back and forth."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.policy import PolicyConfig, State, decide
from cluster.policy_facts import Facts, Kept, Lever, Levers, Outlook
from cluster.policy_migration import (
    DWELL_S,
    INTERVAL_S,
    PATIENCE_S,
    ROOMY,
    MigrationState,
    plan_migrations,
)
from cluster.reports import GroupReport
from engine.control import HostSnapshot
from tests.unit.samples import MEMORY, snapshot

GIB = 1 << 30
CONFIG = PolicyConfig()
FACTS = Facts(
    group_id="g",
    model_id="a",
    node_id="node",
    num_ranks=1,
    slab=GIB // 4,
    physical=GIB,
    limit=16 * GIB,
    held=0,
    pool=64 * GIB,
    kv=8 * GIB,
    num_waiting=0,
    num_waiting_late=0,
    num_running=8,
    num_parked=0,
    num_parked_late=0,
    expected_ttft_s=0.1,
    ttft_slo_s=2.0,
    first=(0, 0),
    paced=(0, 0),
    num_ended=0,
    num_refused=0,
    host_total=64 * GIB,
    host_available=32 * GIB,
)
LATE = {"num_parked": 4, "num_parked_late": 2, "kv": 60 * GIB}


def group(name: str, **facts: object) -> Outlook:
    return Outlook(
        replace(FACTS, group_id=name, **facts),  # type: ignore[arg-type]
        Levers(Lever(16 * GIB)),
        need=0.0,
        seen_s=0.0,
        sequence_bytes=float(GIB),
    )


def by_id(*groups: Outlook) -> dict[str, Outlook]:
    return {one.facts.group_id: one for one in groups}


def after(groups: dict[str, Outlook], seconds: float = PATIENCE_S) -> tuple[dict[str, str], MigrationState]:
    """What is decided once things have been so for a while."""
    pairs, state = plan_migrations(groups, MigrationState(), CONFIG, 100.0)
    assert pairs == {}, "lateness that has just begun may pass by itself"
    return plan_migrations(groups, state, CONFIG, 100.0 + seconds)


def test_a_late_group_sends_to_a_calm_one_and_the_same_node_is_preferred() -> None:
    far = group("far", node_id="elsewhere", kv=0)
    near = group("near", kv=20 * GIB)
    assert after(by_id(group("late", **LATE), far))[0] == {"late": "far"}
    assert after(by_id(group("late", **LATE), far, near))[0] == {"late": "near"}
    assert after(by_id(group("late", **LATE), near), PATIENCE_S / 2)[0] == {}


def test_nobody_sends_where_it_would_not_pay() -> None:
    late = group("late", **LATE)
    unfit = [
        group("other-model", model_id="b"),
        group("other-ranks", num_ranks=2),
        group("no-balloon", slab=0),
        group("waits", num_waiting=1),
        group("parks", num_parked=1),
        group("full", kv=int(ROOMY * FACTS.pool)),
        group("full-balloon", held=16 * GIB),
        replace(group("breaks-promises"), pace=Kept(1.0, 9.0)),
        replace(group("small-balloon"), levers=Levers(Lever(GIB))),
    ]
    assert after(by_id(late, *unfit))[0] == {}
    assert after(by_id(late, *unfit, group("fit")))[0] == {"late": "fit"}


def test_two_late_groups_do_not_meet_at_one_target() -> None:
    first, second = group("first", **LATE), group("second", **LATE)
    pairs, state = after(by_id(first, second, group("calm")))
    assert pairs == {"first": "calm"}
    soon = 100.0 + PATIENCE_S + INTERVAL_S / 2
    assert plan_migrations(by_id(first, second, group("calm")), state, CONFIG, soon)[0] == {}
    later = 100.0 + PATIENCE_S + INTERVAL_S
    assert len(plan_migrations(by_id(first, second, group("calm")), state, CONFIG, later)[0]) == 1


def test_roles_change_only_after_a_dwell_time() -> None:
    pairs, state = after(by_id(group("one", **LATE), group("two")))
    assert pairs == {"one": "two"}
    changed = by_id(group("one"), group("two", **LATE))
    now = 100.0 + PATIENCE_S
    for _ in range(int(DWELL_S / INTERVAL_S)):
        pairs, state = plan_migrations(changed, state, CONFIG, now)
        assert pairs == {}
        now += INTERVAL_S
    assert plan_migrations(changed, state, CONFIG, now)[0] == {"two": "one"}


_GROUPS = st.lists(
    st.tuples(
        st.sampled_from("ab"),  # model
        st.integers(0, 2),  # late parked requests
        st.integers(0, 1),  # waiting ones
        st.integers(0, 64),  # GiB of KV
    ),
    min_size=6,
    max_size=6,
)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(_GROUPS, st.sampled_from([0.5, 1.0, 5.0])), min_size=1, max_size=40))
def test_whatever_groups_tell(ticks: list[tuple[list[tuple[str, int, int, int]], float]]) -> None:
    """Groups' models stay what they are; everything else changes at every tick."""
    state, now = MigrationState(), 0.0
    sent: dict[str, float] = {}
    received: dict[str, float] = {}
    late_since: dict[str, float] = {}
    models = [row[0] for row in ticks[0][0]]
    for rows, pause_s in ticks:
        now += pause_s
        groups = by_id(
            *(
                group(
                    f"g{at}",
                    model_id=models[at],
                    num_parked=late,
                    num_parked_late=late,
                    num_waiting=waits,
                    kv=kv * GIB,
                )
                for at, (_, late, waits, kv) in enumerate(rows)
            )
        )
        late_since = {
            name: late_since.get(name, now) for name, one in groups.items() if one.facts.num_parked_late
        }
        pairs, state = plan_migrations(groups, state, CONFIG, now)
        assert len(set(pairs.values())) == len(pairs)
        assert not set(pairs) & set(pairs.values())
        for source, target in pairs.items():
            ours, theirs = groups[source].facts, groups[target].facts
            assert ours.model_id == theirs.model_id
            assert now - late_since[source] >= PATIENCE_S
            assert theirs.num_parked == theirs.num_waiting == 0
            assert theirs.kv < ROOMY * theirs.pool
            assert now - received.get(source, -math.inf) >= DWELL_S, "what came goes on at once"
            assert now - sent.get(target, -math.inf) >= DWELL_S, "what went comes back at once"
            assert now - sent.get(source, -math.inf) >= INTERVAL_S
            assert now - received.get(target, -math.inf) >= INTERVAL_S
        sent |= dict.fromkeys(pairs, now)
        received |= dict.fromkeys(pairs.values(), now)


def test_it_is_ordered_with_a_number_of_its_own_until_it_helps() -> None:
    """By `decide`, as the controller calls it."""
    memory = replace(MEMORY, balloon_slab=1, balloon_limit=80, balloon=0, balloon_cached=0, kv=5)
    host = HostSnapshot("node", GIB, GIB)
    calm = replace(snapshot("a"), memory=memory, host=host, num_waiting=0, num_parked=0, num_running=1)
    late = replace(calm, num_parked=3, num_parked_late=2, memory=replace(memory, kv=60))
    reports = [GroupReport("late", "a", 1, 2.0, late), GroupReport("calm", "a", 1, 2.0, calm)]
    state, numbers = State(4), []
    for at in range(12):
        decision, state = decide(reports, state, CONFIG, float(at))
        for one in decision.instructions:
            if one.migration is not None:
                assert (one.group_id, one.migration.group_id) == ("late", "calm")
                assert one.migration.min_stay_s == DWELL_S
                numbers.append((one.migration.epoch, one.migration.revision))
                assert [action.action for action in decision.actions].count("migrate") == 1
    assert len(numbers) == 1 + int((11 - PATIENCE_S) / INTERVAL_S)
    assert numbers == sorted(set(numbers))
    assert {epoch for epoch, _ in numbers} == {4}
    decision, _ = decide([reports[1]], state, CONFIG, 12.0)
    assert all(one.migration is None for one in decision.instructions)
