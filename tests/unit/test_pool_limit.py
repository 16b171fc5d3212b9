"""A pool whose limit is lowered and raised while it serves, as on a device that several engines share."""

from __future__ import annotations

import random

import pytest

from engine.config import MemoryConfig, SchedulerConfig
from engine.control import Order, OrderAnswer
from engine.memory.copies import ThreadCopies
from tests.failing_memory import FailingVirtualMemory
from tests.fakes import CHUNK_BYTES, Bench
from tests.unit.engine_cases import Talk, ask, converse, finish, serve

pytestmark = pytest.mark.usefixtures("steps_ahead")

TOTAL, MOST = 64, 120
BALLOON = 200


def _bench(vm: FailingVirtualMemory | None = None, **options: object) -> Bench:
    limits = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64)
    return Bench(TOTAL, scheduler=limits, vm=vm or FailingVirtualMemory(CHUNK_BYTES, MOST), **options)  # type: ignore[arg-type]


def _order(bench: Bench, revision: int, chunks: int | None) -> OrderAnswer:
    """Given, and answered in the next step."""
    balloon = BALLOON * CHUNK_BYTES if bench.pool.parking else 0
    pool_bytes = None if chunks is None else chunks * CHUNK_BYTES
    future = bench.engine.apply(Order(1, revision, balloon, balloon, pool_bytes=pool_bytes))
    bench.engine.step()
    return future.result(timeout=20)


def test_without_a_limit_an_order_changes_nothing() -> None:
    bench = _bench()
    assert _order(bench, 1, None) == OrderAnswer("applied", 1, 1)
    memory = bench.engine.snapshot.memory
    assert (memory.total, memory.limit, memory.configured) == (TOTAL, TOTAL, TOTAL)
    serve(bench, [ask(f"r{i}", 20, 40) for i in range(4)])


def test_what_nobody_needs_goes_back_at_once() -> None:
    """Free chunks, the arena's tail and cached prefixes: an idle engine holds no more than its limit."""
    bench = _bench()
    serve(bench, [ask(f"r{i}", 60, 60) for i in range(6)])
    assert bench.pool.chunks.num_created > 30
    assert bench.pool.num_evictable > 0
    assert _order(bench, 1, 12) == OrderAnswer("applied", 1, 1)
    memory = bench.engine.snapshot.memory
    assert memory.created <= memory.total == memory.limit == 12
    assert memory.configured == TOTAL
    bench.assert_idle()


def test_prefixes_stay_as_far_as_there_is_room_for_them() -> None:
    bench = _bench()
    serve(bench, [ask(f"r{i}", 60, 4) for i in range(6)])
    cached = bench.pool.num_evictable
    _order(bench, 1, 40)
    assert 0 < bench.pool.num_evictable <= cached
    assert bench.engine.snapshot.memory.total == 40


def test_more_than_is_configured_may_be_made_under_a_higher_limit() -> None:
    bench = _bench()
    requests = [ask(f"r{i}", 100, 24) for i in range(8)]  # 16 chunks each
    for request in requests:
        bench.engine.submit(request)
    assert _order(bench, 1, MOST) == OrderAnswer("applied", 1, 1)
    most = 0
    while bench.engine.step():
        most = max(most, bench.engine.snapshot.memory.created)
    assert TOTAL < most <= MOST
    finish(bench, requests)
    assert _order(bench, 2, None) == OrderAnswer("applied", 1, 2)
    assert bench.engine.snapshot.memory.total == TOTAL >= bench.engine.snapshot.memory.created


def test_a_device_that_has_not_got_it_back_yet_is_no_error() -> None:
    """The other engine still holds what this one was promised: it does with what there is, and asks again."""
    vm = FailingVirtualMemory(CHUNK_BYTES, MOST)
    bench = _bench(vm)
    _order(bench, 1, MOST)
    most = bench.pool.chunks.num_created + 30
    vm.refuse("create", after=30, times=None)
    requests = [ask(f"r{i}", 60, 40) for i in range(8)]
    for request in requests:
        bench.engine.submit(request)
    for _ in range(30):
        bench.engine.step()
        assert bench.engine.snapshot.memory.created <= most
    assert vm.refusals.num_refused["create"] > 0
    assert not any(delta.error for delta in bench.deltas.values())
    vm.allow()
    finish(bench, requests)


@pytest.mark.parametrize("balloon", [0, BALLOON])
def test_sequences_leave_when_their_memory_is_to_go_and_every_answer_is_its_own(balloon: int) -> None:
    copies = {"balloon_chunks": balloon, "copies": ThreadCopies(CHUNK_BYTES)} if balloon else {}
    bench = _bench(**copies)  # type: ignore[arg-type]
    requests = [ask(f"r{i}", 40, 60) for i in range(4)]
    for request in requests:
        bench.engine.submit(request)
    while bench.engine.snapshot.memory.kv < 24:
        bench.engine.step()
    answer = _order(bench, 1, 20)
    if answer.outcome == "deferred":
        assert answer.device_overage_bytes > 0 == answer.overage_bytes
    for _ in range(40):
        bench.engine.step()
        if not bench.pool.limit.overage_bytes:
            break
    assert bench.engine.snapshot.memory.created <= 20
    assert _order(bench, 1, 20) == OrderAnswer("applied", 1, 1), "the same one again, once it is so"
    assert bench.engine.snapshot.num_running < 4
    decisions = dict(bench.engine.snapshot.decisions)
    assert decisions.get("park_for_growth" if balloon else "recompute", 0) > 0
    finish(bench, requests)
    assert bench.engine.snapshot.memory.created <= 20


def test_overage_is_told_until_steps_in_flight_have_let_go(steps_ahead: int) -> None:
    bench = _bench()
    requests = [ask(f"r{i}", 60, 40) for i in range(4)]
    for request in requests:
        bench.engine.submit(request)
    while bench.engine.snapshot.memory.kv < 32:
        bench.engine.step()
    held = bench.pool.chunks.num_created
    future = bench.engine.apply(Order(1, 1, 0, 0, pool_bytes=24 * CHUNK_BYTES))
    bench.engine.step()
    answer = future.result(timeout=20)
    assert answer.outcome == "deferred"
    assert 0 < answer.device_overage_bytes <= (held - 24) * CHUNK_BYTES
    finish(bench, requests)
    assert bench.engine.snapshot.memory.created <= 24


def test_a_request_that_does_not_fit_while_memory_is_lent_waits_for_it() -> None:
    """It fits what is configured, so it is not too large: nothing fails, and what it needs is told."""
    bench = _bench(shared_device="cpu")
    _order(bench, 1, 8)
    large, small = ask("large", 120, 100), ask("small", 10, 5)
    bench.engine.submit(large)
    bench.engine.submit(small)
    for _ in range(200):
        bench.engine.step()
    assert "large" not in bench.deltas
    memory = bench.engine.snapshot.memory
    assert 8 < memory.floor <= TOTAL
    assert bench.engine.snapshot.num_waiting >= 1
    bench.engine.check_alive()
    _order(bench, 2, memory.floor)
    finish(bench, [large, small])


def test_the_floor_is_enough_for_the_longest_request() -> None:
    """Whatever is open, under a limit of the floor that is told everything is served in the end."""
    for prompt, output in ((3, 5), (100, 20), (200, 56), (255, 1)):
        bench = _bench(shared_device="cpu")
        request = ask("r", prompt, output)
        bench.engine.submit(request)
        bench.clock.now += 1.0
        bench.engine.step()
        _order(bench, 1, bench.engine.snapshot.memory.floor)
        finish(bench, [request])


def test_a_limit_below_the_engines_own_needs_is_not_reached_and_wedges_nothing() -> None:
    bench = _bench()
    answer = _order(bench, 1, 0)
    assert answer.outcome == "deferred", "the guard and the arena's first chunk stay"
    request = ask("r", 20, 5)
    bench.engine.submit(request)
    for _ in range(20):
        bench.engine.step()
    _order(bench, 2, None)
    finish(bench, [request])


def test_a_pool_that_is_set_aside_for_good_has_no_such_lever() -> None:
    bench = Bench(TOTAL, MemoryConfig(mode="virtual"))
    assert _order(bench, 1, 20) == OrderAnswer("conflict", -1, -1)
    assert bench.pool.chunks.total == TOTAL


def test_a_stale_limit_is_refused() -> None:
    bench = _bench()
    assert _order(bench, 3, 30).outcome == "applied"
    assert _order(bench, 2, 60) == OrderAnswer("stale", 1, 3)
    assert bench.engine.snapshot.memory.limit == 30


@pytest.mark.parametrize("seed", range(2))
def test_conversations_under_limits_that_change_at_random_lose_nothing(seed: int) -> None:
    class Limited(Talk):
        """Between two requests the controller changes its mind."""

        num_orders = 0

        def next(self):  # type: ignore[no-untyped-def]
            if self.dice.random() < 0.4:
                self.num_orders += 1
                chunks = self.dice.choice([None, 0, 24, 40, TOTAL, MOST])
                pool_bytes = None if chunks is None else chunks * CHUNK_BYTES
                bench.engine.apply(Order(1, self.num_orders, 0, 0, pool_bytes=pool_bytes))
            return super().next()

    bench = _bench()
    talk = Limited(seed)
    restored = bench.run

    def run() -> None:
        bench.engine.apply(Order(2, 0, 0, 0))
        restored()

    bench.run = run  # type: ignore[method-assign]
    converse(bench, seed, turns=30, talk=talk)
    assert talk.num_orders > 5


def test_limits_and_refusals_together_keep_the_books() -> None:
    dice, vm = random.Random(5), FailingVirtualMemory(CHUNK_BYTES, MOST)
    bench, revision = _bench(vm), 0
    for turn in range(30):
        if dice.random() < 0.3:
            vm.refuse(
                dice.choice(["create", "release", "unmap"]),
                after=dice.randrange(8),
                times=dice.randrange(1, 4),
            )
        bench.engine.submit(ask(f"r{turn}", dice.randrange(1, 120), dice.randrange(1, 40)))
        revision += 1
        bench.engine.apply(Order(1, revision, 0, 0, pool_bytes=dice.randrange(20, MOST) * CHUNK_BYTES))
        for _ in range(dice.randrange(12)):
            bench.engine.step()
            bench.pool.check()
    vm.allow()
    bench.engine.apply(Order(1, revision + 1, 0, 0))
    bench.run()
    for turn in range(30):
        assert f"r{turn}" in bench.deltas
        assert bench.deltas[f"r{turn}"].finish_reason == "length"
    bench.assert_idle()
