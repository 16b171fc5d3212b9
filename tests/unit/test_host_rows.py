"""Rows in the balloon: who uses them, what is found, and in which order they are given up."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from engine.errors import ConservationError
from engine.memory.balloon import Balloon
from engine.memory.host_rows import HostRow, HostRows
from engine.memory.slabs import PlainSlabs
from tests.unit.parking_cases import filled

GROUPS, CHUNK_BYTES = 2, 4096


def make(num_rows: int) -> HostRows:
    chunks = num_rows * GROUPS
    return HostRows(filled(Balloon(PlainSlabs(), CHUNK_BYTES, chunks, chunks)), GROUPS)


def taken(host: HostRows, count: int) -> list[HostRow]:
    rows = host.take(count)
    assert rows is not None
    return rows


def keep(host: HostRows, *digests: bytes) -> None:
    """A sequence that ended left these."""
    rows = taken(host, len(digests))
    for row, digest in zip(rows, digests, strict=True):
        host.remember(row, digest)
    host.release(rows)


def test_a_row_has_a_chunk_of_each_group_and_groups_lie_together() -> None:
    assert [row.chunks for row in taken(make(4), 3)] == [(0, 3), (1, 4), (2, 5)]


def test_what_nobody_can_find_is_free_at_once() -> None:
    host = make(4)
    host.release(taken(host, 4))
    assert (host.num_cached, host.balloon.num_used, host.num_spare) == (0, 0, 4)


def test_what_can_be_found_stays_until_it_is_in_the_way() -> None:
    host = make(4)
    keep(host, b"a", b"b", b"c")
    assert (host.num_cached, host.num_spare) == (3 * GROUPS, 4)
    rows = taken(host, 3)
    assert [digest in host for digest in (b"a", b"b", b"c")] == [True, False, False], "the last goes first"
    host.check(Counter(rows))


def test_what_was_used_last_goes_last() -> None:
    host = make(4)
    keep(host, b"a", b"b")
    keep(host, b"x", b"y")
    found = host.find([b"a", b"b"])
    host.use(found)
    host.release(found)
    host.release(taken(host, 2))
    assert [digest in host for digest in (b"a", b"b", b"x", b"y")] == [True, True, False, False]


def test_nobody_takes_what_is_used() -> None:
    host = make(3)
    keep(host, b"a", b"b")
    found = host.find([b"a"])
    host.use(found)
    assert host.take(3) is None
    assert b"b" in host, "nothing is given up in vain"
    rows = taken(host, 2)
    assert (b"a" in host, b"b" in host) == (True, False)
    host.check(Counter([*found, *rows]))


def test_only_a_run_from_the_beginning_is_found() -> None:
    host = make(4)
    keep(host, b"a", b"c")
    assert [row.digest for row in host.find([b"a", b"b", b"c"])] == [b"a"]
    assert host.find([b"b", b"a"]) == []


def test_the_same_content_is_kept_once() -> None:
    host = make(4)
    keep(host, b"a")
    keep(host, b"a", b"b")
    assert host.num_cached == 2 * GROUPS


def test_a_balloon_that_was_deflated_gives_nothing_more() -> None:
    host = make(4)
    keep(host, b"a", b"b")
    host.balloon.set_logical(1)
    assert host.take(1) is None


def test_a_wrong_count_is_seen() -> None:
    host = make(4)
    rows = taken(host, 2)
    with pytest.raises(ConservationError):
        host.check(Counter(rows[:1]))
    with pytest.raises(ConservationError):
        host.check(Counter([*rows, *rows]))


@pytest.mark.parametrize("seed", range(5))
def test_no_row_is_lost(seed: int) -> None:
    dice, host = random.Random(seed), make(12)
    held: list[list[HostRow]] = []
    names = [bytes([at]) for at in range(20)]
    for _ in range(3000):
        act = dice.randrange(5)
        if act == 0:
            rows = host.take(dice.randint(1, 5))
            held += [rows] if rows is not None else []
        elif act == 1 and held:
            for row in dice.choice(held):
                host.remember(row, dice.choice(names))
        elif act == 2 and held:
            host.release(held.pop(dice.randrange(len(held))))
        elif act == 3:
            found = host.find(dice.sample(names, 3))
            host.use(found)
            held += [found] if found else []
        elif dice.random() < 0.02:
            host.forget_idle()
            assert host.num_cached == 0
        host.check(Counter(row for rows in held for row in rows))
    assert host.num_spare + len({row for rows in held for row in rows}) == 12
