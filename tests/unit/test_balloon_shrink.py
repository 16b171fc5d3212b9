"""Host memory that goes back slab by slab, and orders that an engine follows while sequences are parked."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import MemoryConfig, SchedulerConfig
from engine.control import Order, OrderAnswer
from engine.memory.balloon import Balloon
from engine.memory.slabs import PlainSlabs, Slab
from engine.simulated import NullSlabs
from tests.fakes import CHUNK_BYTES, Bench
from tests.unit.engine_cases import ask, finish

CHUNK, SLAB, PLENTY = 4096, 4, 1 << 40
REQUESTS = [replace(ask(f"r{at}", 20 + 7 * at, 90), tpot_slo_s=0.01) for at in range(4)]


class Counted(NullSlabs):
    """Slabs, and how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.num_there = 0

    def make(self, nbytes: int) -> Slab:
        self.num_there += 1
        return _CountedSlab(super().make(nbytes).address, self)


class _CountedSlab:
    def __init__(self, address: int, maker: Counted) -> None:
        self.address = address
        self._maker = maker

    def free(self) -> None:
        self._maker.num_there -= 1


def until(is_true: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < give_up
        time.sleep(0.001)


def grown(balloon: Balloon, num_physical: int) -> Balloon:
    def is_grown() -> bool:
        balloon.grow_ahead()
        return balloon.num_physical >= num_physical

    until(is_grown)
    return balloon


def settled(balloon: Balloon) -> None:
    """Slabs that are going have gone."""

    def is_settled() -> bool:
        balloon.grow_ahead()
        return balloon.num_held == balloon.num_physical

    until(is_settled)


def test_empty_slabs_go_back_at_once_and_others_when_they_are_empty() -> None:
    slabs = Counted()
    balloon = grown(Balloon(slabs, CHUNK, 12, SLAB, lambda: PLENTY, is_filled=True), 12)
    first, second = balloon.take(4), balloon.take(2)
    assert first == [0, 1, 2, 3]
    assert second == [4, 5]
    balloon.set_physical(4)
    balloon.check()
    settled(balloon)
    assert (balloon.num_physical, slabs.num_there) == (8, 2), "the empty one has gone"
    assert balloon.is_shrinking
    assert [balloon.is_leaving(chunk) for chunk in (0, 5)] == [False, True]
    balloon.put_back([4])
    assert balloon.take(1) is None, "none in a slab that is to go"
    balloon.put_back([5])
    settled(balloon)
    balloon.check()
    assert (balloon.num_physical, slabs.num_there, balloon.is_shrinking) == (4, 1, False)
    balloon.put_back(first)
    assert balloon.take(4) == first
    balloon.close()
    assert slabs.num_there == 0


def test_a_later_order_keeps_slabs_that_have_not_gone() -> None:
    slabs = Counted()
    balloon = grown(Balloon(slabs, CHUNK, 8, SLAB, lambda: PLENTY, is_filled=True), 8)
    taken = balloon.take(7)
    assert taken is not None
    balloon.set_physical(0)
    assert balloon.is_shrinking
    balloon.put_back([1])
    balloon.set_physical(8)
    balloon.set_logical(8)
    balloon.check()
    assert not balloon.is_shrinking
    assert sorted(balloon.take(2) or []) == [1, 7]
    assert slabs.num_there == 2
    balloon.close()


def test_a_gap_is_filled_again() -> None:
    balloon = grown(Balloon(Counted(), CHUNK, 12, SLAB, lambda: PLENTY, is_filled=True), 12)
    assert balloon.take(12) is not None
    balloon.put_back(range(4, 8))
    balloon.set_physical(8)
    settled(balloon)
    balloon.set_physical(12)
    balloon.set_logical(12)
    grown(balloon, 12)
    assert balloon.take(4) == [4, 5, 6, 7]
    balloon.check()
    balloon.close()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["take", "put back", "logical", "physical", "slab"]), st.integers(0, 14)),
        max_size=40,
    )
)
def test_whatever_is_ordered_no_chunk_is_lost(operations: list[tuple[str, int]]) -> None:
    slabs = Counted()
    balloon = Balloon(slabs, CHUNK, 12, SLAB, lambda: PLENTY)
    taken: list[int] = []
    for what, count in operations:
        if what == "take" and (chunks := balloon.take(count)) is not None:
            assert len(chunks) == count
            assert not any(balloon.is_leaving(chunk) for chunk in chunks)
            taken += chunks
        elif what == "put back":
            balloon.put_back(taken[:count])
            del taken[:count]
        elif what == "logical":
            balloon.set_logical(count)
        elif what == "physical":
            balloon.set_physical(count)
            assert balloon.num_logical <= balloon.num_limit == count
        elif what == "slab" and balloon.is_growing:
            wanted = balloon.num_physical
            until(lambda: balloon._growth is None or balloon._growth.done())
            balloon.grow_ahead()
            assert balloon.num_physical <= max(wanted + SLAB, balloon.num_limit)
        balloon.check()
        assert balloon.num_used == len(taken) == len(set(taken))
    balloon.put_back(taken)
    balloon.set_physical(0)
    until(lambda: balloon._growth is None or balloon._growth.done())
    settled(balloon)
    balloon.check()
    assert slabs.num_there == balloon.num_physical == 0
    balloon.close()


def _engine(balloon_chunks: int = 400, slab_chunks: int = 40) -> Bench:
    limits = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64, turn_tokens=4, min_retained_chunks=8)
    balloon = Balloon(PlainSlabs(), CHUNK_BYTES, balloon_chunks, slab_chunks, lambda: PLENTY, is_filled=True)
    return Bench(46, MemoryConfig(map_ahead_tokens=0), limits, balloon=grown(balloon, balloon_chunks))


def _order(revision: int, chunks: int, epoch: int = 1, **levers: float) -> Order:
    return Order(epoch, revision, chunks * CHUNK_BYTES, chunks * CHUNK_BYTES, **levers)


def _apply(bench: Bench, order: Order) -> OrderAnswer:
    answer = bench.engine.apply(order)
    bench.engine.step()
    return answer.result(timeout=20)


def _obeyed(bench: Bench, order: Order) -> OrderAnswer:
    """The answer once slabs that nobody uses have gone: that takes a moment."""
    first = _apply(bench, order)
    assert first.outcome in ("applied", "deferred")
    until(lambda: _apply(bench, order).outcome == "applied")
    return _apply(bench, order)


def test_later_orders_replace_earlier_ones_and_not_the_other_way_round() -> None:
    bench = _engine()
    assert _obeyed(bench, _order(5, 200)) == OrderAnswer("applied", 1, 5)
    assert bench.engine.snapshot.order == _order(5, 200)
    assert _apply(bench, _order(4, 80)) == OrderAnswer("stale", 1, 5)
    assert _apply(bench, _order(5, 80)) == OrderAnswer("conflict", 1, 5), "two orders under one number"
    assert _apply(bench, _order(5, 200)) == OrderAnswer("applied", 1, 5), "the same one again"
    assert bench.balloon.num_logical == 200
    assert _obeyed(bench, _order(0, 80, epoch=2)) == OrderAnswer("applied", 2, 0)
    assert _apply(bench, _order(99, 200)).outcome == "stale", "of an earlier controller"
    assert bench.balloon.num_logical == bench.balloon.num_physical == 80
    assert bench.engine.snapshot.memory.balloon_limit == 80


def test_an_engine_without_a_balloon_says_so() -> None:
    bench = Bench()
    assert _apply(bench, _order(1, 8)) == OrderAnswer("conflict", -1, -1)
    assert bench.engine.snapshot.order is None
    assert _apply(bench, _order(1, 0, admission_weight=0.5)).outcome == "applied"


def test_the_engines_own_feedback_works_within_the_order() -> None:
    bench = _engine()
    turns = bench.scheduler.turns
    _apply(bench, _order(1, 200, admission_weight=0.5, retention=0.25))
    assert (turns.num_allowed, turns.prompt_share, turns.min_retained_chunks) == (200, 0.5, 2)
    for _ in range(5):
        turns._feedback.step(next_token_late=True, first_token_late=False)
    assert (turns.num_allowed, turns.prompt_share) == (100, 0.5), "two caps: the lower one counts"
    _apply(bench, _order(2, 400))
    assert (turns.num_allowed, turns.prompt_share) == (200, 0.5), "an order leaves the feedback's share alone"


@pytest.mark.parametrize("at_step", [3, 40, 90])
def test_deflating_while_sequences_are_parked_loses_nothing(at_step: int) -> None:
    bench = _engine()
    for request in REQUESTS:
        bench.engine.submit(request)
    for _ in range(at_step):
        bench.engine.step()
    answer = _apply(bench, _order(1, 40))
    held = bench.balloon.num_used
    assert (answer.outcome == "deferred") == (answer.overage_bytes > 0)
    assert held <= bench.balloon.num_physical
    finish(bench, REQUESTS)
    settled(bench.balloon)
    bench.engine.step()
    assert _obeyed(bench, _order(1, 40)).outcome == "applied"
    assert bench.balloon.num_physical <= 40
    assert bench.balloon.num_used <= 40, "what is only kept to be found had to go"


def test_promises_are_counted() -> None:
    bench = _engine()
    for request in REQUESTS:
        bench.engine.submit(replace(request, ttft_slo_s=1e9))
    bench.engine.submit(replace(ask("late", 20, 5), ttft_slo_s=0.0, tpot_slo_s=1e9))
    bench.run()
    now = bench.engine.snapshot
    assert (now.first_in_time, now.first_late) == (4, 1)
    assert now.paced_in_time + now.paced_late == 5
    assert now.paced_in_time >= 1
    assert (now.num_waiting_late, now.oldest_wait_s) == (0, 0.0)
