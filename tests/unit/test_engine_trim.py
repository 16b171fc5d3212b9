"""Memory that goes back to the system: on order, after idle time, and what is left of it for real."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future

import pytest

from engine.config import MemoryConfig, SchedulerConfig
from engine.memory.host_vmm import HostVirtualMemory
from tests.fakes import CHUNK_BYTES, Bench
from tests.unit.engine_cases import ask, expect, serve

pytestmark = pytest.mark.usefixtures("steps_ahead")

KEPT = 2  # chunks: the guard, and the arena's first


def physical_bytes(vm: HostVirtualMemory) -> int:
    """What the system holds behind the driver's file."""
    return os.fstat(vm._file.fileno()).st_blocks * 512


def created_bytes(bench: Bench) -> int:
    return bench.pool.snapshot().created * CHUNK_BYTES


def trimmed(bench: Bench, drop_cache: bool = False) -> int:
    """Orders a trim and makes one step: what the order says it freed, which is what was no longer there."""
    before, freed = created_bytes(bench), bench.engine.trim(drop_cache)
    told: list[int] = []
    freed.add_done_callback(lambda _: told.append(bench.engine.snapshot.memory.created * CHUNK_BYTES))
    assert not told, "the loop does it, between steps"
    bench.engine._apply_orders()
    assert told == [created_bytes(bench)], "whoever waits for it looks at the snapshot next"
    bench.engine.step()
    assert freed.result() == before - told[0]
    return freed.result()


@pytest.mark.parametrize("drop_cache", [False, True])
def test_a_trim_while_idle_frees_what_it_says(drop_cache: bool) -> None:
    bench = Bench()
    serve(bench, [ask("a", 100, 50)])
    before, cached = created_bytes(bench), bench.pool.snapshot().cached
    assert cached > 0
    assert trimmed(bench, drop_cache) == before - created_bytes(bench) > 0
    now = bench.pool.snapshot()
    assert now.cached == (0 if drop_cache else cached)
    assert now.created == KEPT + now.cached
    bench.assert_idle()
    serve(bench, [ask("b", 100, 50)])


def test_a_second_trim_finds_nothing() -> None:
    bench = Bench()
    serve(bench, [ask("a", 100, 50)])
    trimmed(bench)
    assert trimmed(bench) == 0


def test_what_stays_is_read_again_and_what_is_dropped_computed_again() -> None:
    bench = Bench()
    for name, drop_cache in (("kept", False), ("dropped", True)):
        serve(bench, [ask("a", 100, 20)])
        trimmed(bench, drop_cache)
        bench.deltas.pop("a")
        serve(bench, [ask("a", 100, 20)])
        cached = bench.deltas.pop("a").num_cached_tokens
        assert (cached > 90) == (name == "kept")
        trimmed(bench, drop_cache=True)


@pytest.mark.parametrize("drop_cache", [False, True])
def test_a_trim_while_busy_takes_from_nobody(drop_cache: bool) -> None:
    """Each running sequence goes on with its own chunks, and so does what steps in flight compute in."""
    bench = Bench(128, scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64))
    serve(bench, [ask("before", 120, 40)])
    requests = [ask(f"r{i}", 20 + 10 * i, 40) for i in range(5)]
    for request in requests:
        bench.engine.submit(request)
    for count in range(30):
        bench.engine.step()
        kv, tokens = bench.engine.snapshot.memory.kv, bench.engine.snapshot.memory.kv_tokens
        if count % 3 == 0:
            trimmed(bench, drop_cache)
            now = bench.pool.snapshot()
            assert now.kv >= kv
            assert now.kv_tokens > tokens, "the step after the order ran"
            assert now.cached == 0 or not drop_cache
        bench.pool.check()
    bench.run()
    for request in requests:
        expect(bench, request)
        assert bench.deltas[request.request_id].num_preemptions == 0
    bench.assert_idle()


def test_a_trim_beside_steps_in_flight_frees_nothing_they_read() -> None:
    bench = Bench(steps_ahead=2)
    bench.engine.submit(ask("a", 50, 60))
    for _ in range(6):
        bench.engine.step()
    assert len(bench.engine._in_flight) == 2
    bench.engine.cancel("a")
    held = bench.pool.snapshot().kv
    freed = bench.engine.trim(drop_cache=True)
    bench.engine._apply_orders()
    now = bench.pool.snapshot()
    assert now.retiring >= held, "until the steps have ended"
    assert now.created >= KEPT + held
    assert freed.done()
    bench.run()
    assert trimmed(bench) > 0
    assert bench.pool.snapshot().created == KEPT


def test_a_trim_beside_a_prefill_in_flight_leaves_it_its_activations() -> None:
    bench = Bench(steps_ahead=2)
    bench.engine.submit(ask("a", 60, 10))
    bench.engine.step()
    assert len(bench.engine._in_flight) == 1
    used = bench.pool.arena.num_backed
    assert used > 5
    bench.engine.trim()
    bench.engine._apply_orders()
    now = bench.pool.snapshot()
    assert now.activation + now.retiring == used
    assert now.created == 1 + used + now.kv
    bench.run()
    expect(bench, ask("a", 60, 10))
    bench.assert_idle()


def test_a_trim_that_was_called_off_does_nothing() -> None:
    bench = Bench()
    serve(bench, [ask("a", 100, 50)])
    before, order = created_bytes(bench), bench.engine.trim(drop_cache=True)
    assert order.cancel()
    bench.engine.step()
    assert created_bytes(bench) == before


@pytest.mark.parametrize("use_native", [True, False])
def test_memory_really_goes_back_to_the_system_and_is_taken_again(use_native: bool) -> None:
    vm = HostVirtualMemory(CHUNK_BYTES, 64, use_native)
    bench = Bench(64, vm=vm)
    serve(bench, [ask(f"r{i}", 60, 60) for i in range(4)])
    held = physical_bytes(vm)
    assert held >= 40 * CHUNK_BYTES
    freed = trimmed(bench, drop_cache=True)
    assert held - physical_bytes(vm) <= freed, "chunks that nobody has written to cost nothing yet"
    assert physical_bytes(vm) <= KEPT * CHUNK_BYTES
    serve(bench, [ask(f"s{i}", 60, 60) for i in range(4)])
    assert physical_bytes(vm) >= 40 * CHUNK_BYTES
    vm.close()


class OneTurn(threading.Event):
    """Stops a loop when it asks for the second time."""

    def is_set(self) -> bool:
        is_second = super().is_set()
        self.set()
        return is_second


class Idle:
    """An engine whose loop is run by hand, at times of our choosing."""

    def __init__(self, after_s: float | None) -> None:
        self.bench = Bench(memory=MemoryConfig(trim_after_s=after_s))
        self.now = 0.0
        self.bench.engine._clock = lambda: self.now
        self.bench.engine._last_busy_s = 0.0

    def work(self, name: str, at: float) -> int:
        """A request at that time; the bytes that are there after it."""
        self.now = at
        serve(self.bench, [ask(name, 60, 30)])
        return created_bytes(self.bench)

    def wakes(self, at: float) -> int:
        """The loop looks for work at that time, and finds none; the bytes that are there after it."""
        self.now = at
        engine = self.bench.engine
        engine._wake.set()  # or it would sleep first
        engine.run_until(OneTurn())
        engine._death = None
        return created_bytes(self.bench)


def test_after_idle_time_free_chunks_go_back_once_and_what_is_cached_stays() -> None:
    idle = Idle(after_s=10.0)
    busy = idle.work("a", at=100.0)
    cached = idle.bench.pool.snapshot().cached
    assert idle.wakes(at=109.9) == busy
    left = idle.wakes(at=110.1)
    assert left == (KEPT + cached) * CHUNK_BYTES < busy
    assert idle.bench.engine.snapshot.memory.created * CHUNK_BYTES == left, "the snapshot says so"
    warm = idle.bench.pool.chunks.take(3, "somebody")
    assert warm is not None
    idle.bench.pool.chunks.put_back(warm)
    assert idle.wakes(at=150.0) == left + 3 * CHUNK_BYTES, "once an idle period"
    assert idle.work("b", at=200.0) > left
    assert idle.wakes(at=209.0) > left, "work begins another one"
    assert idle.wakes(at=210.5) >= left
    assert (
        idle.bench.pool.snapshot().free == idle.bench.pool.chunks.total - idle.bench.pool.chunks.num_created
    )


def test_idle_time_of_zero_gives_back_at_once() -> None:
    idle = Idle(after_s=0)
    idle.work("a", at=5.0)
    assert idle.wakes(at=5.0) == (KEPT + idle.bench.pool.snapshot().cached) * CHUNK_BYTES


def test_without_an_idle_time_nothing_goes_back() -> None:
    idle = Idle(after_s=None)
    busy = idle.work("a", at=5.0)
    assert idle.wakes(at=1e9) == busy


def test_a_start_counts_as_work() -> None:
    """What was made while the engine warmed up goes back too, if nobody comes."""
    idle = Idle(after_s=10.0)
    taken = idle.bench.pool.chunks.take(5, "warm-up")
    assert taken is not None
    idle.bench.pool.chunks.put_back(taken)
    assert idle.wakes(at=9.0) == (KEPT + 5) * CHUNK_BYTES
    assert idle.wakes(at=11.0) == KEPT * CHUNK_BYTES


def test_an_order_that_the_loop_does_not_reach_is_cancelled() -> None:
    bench = Bench()
    stop = threading.Event()
    stop.set()
    order: Future[int] = bench.engine.trim()
    bench.engine.run_until(stop)
    assert order.cancelled()
