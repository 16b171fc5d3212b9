"""The engine loop where memory is short, lent, refused or given back."""

from __future__ import annotations

import random

import pytest

from engine.config import MemoryConfig, SchedulerConfig
from engine.memory.blocks import TokenChain
from tests.failing_memory import FailingVirtualMemory
from tests.fakes import CHUNK_BYTES, Bench
from tests.unit.engine_cases import Talk, ask, expect, finish, serve

pytestmark = pytest.mark.usefixtures("steps_ahead")


@pytest.mark.parametrize("mode", ["elastic", "virtual"])
def test_a_pool_too_small_for_all_preempts_and_loses_nothing(mode: str) -> None:
    bench = Bench(44, MemoryConfig(mode=mode))  # type: ignore[arg-type]
    serve(bench, [ask(f"r{i}", 20, 100) for i in range(8)])
    assert bench.scheduler.num_preemptions > 0
    assert bench.deltas["r0"].num_preemptions == 0, "the oldest is never preempted"


def test_two_long_prompts_that_block_each_other_both_finish() -> None:
    """Each holds half of the pool while prefilling: without a victim neither could go on."""
    bench = Bench(40, scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16), max_model_len=256)
    serve(bench, [ask("a", 150, 60), ask("b", 150, 60)])


def test_a_cancel_frees_memory_within_one_step() -> None:
    bench = Bench()
    bench.engine.submit(ask("a", 100, 100))
    for _ in range(5):
        bench.engine.step()
    assert bench.engine.snapshot.memory.kv > 0
    bench.engine.cancel("a")
    bench.engine.step()
    assert bench.engine.snapshot.memory.kv == 0
    bench.assert_idle()


def test_what_is_in_flight_when_a_sequence_is_preempted_is_said(steps_ahead: int) -> None:
    """Tight pools preempt while tokens are in flight; they are neither lost nor said twice."""
    for total in range(24, 44):
        bench = Bench(total, scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=32))
        serve(bench, [ask(f"r{i}", 3 + 7 * i, 60 + i) for i in range(6)])


def _preemptions_in_a_tight_pool(steps_ahead: int) -> int:
    limits = SchedulerConfig(max_num_seqs=32, max_num_batched_tokens=256)
    bench = Bench(120, scheduler=limits, max_model_len=256, steps_ahead=steps_ahead)
    for i in range(32):
        bench.engine.submit(ask(f"r{i:02}", 5 + 7 * i % 56, 100))
    busy = True
    while busy:
        oldest = sorted(bench.scheduler.unfinished(), key=lambda seq: seq.arrival_s)[:1]
        yielded = [seq.num_preemptions for seq in oldest]
        busy = bench.engine.step()
        assert [seq.num_preemptions for seq in oldest] == yielded, "the oldest never yields"
    bench.assert_idle()
    return bench.scheduler.num_preemptions


def test_a_step_in_flight_costs_no_further_victims() -> None:
    """What a victim gives up is free once that step ends: until then nobody else has to yield."""
    assert 0 < _preemptions_in_a_tight_pool(1) <= _preemptions_in_a_tight_pool(0)


def test_nobody_is_preempted_where_nothing_is_short() -> None:
    """With the last tokens of all sequences in flight there is nothing to compute, and nothing missing."""
    bench = Bench(96)
    for i in range(8):
        bench.engine.submit(ask(f"r{i}", 4, 5))
    bench.run()
    assert bench.scheduler.num_preemptions == 0


def test_a_steady_decode_makes_no_driver_calls() -> None:
    bench = Bench()
    bench.engine.submit(ask("a", 33, 30))  # 33 + 30 tokens end before the next chunk begins
    bench.engine.step()
    bench.engine.step()
    calls = bench.vm.num_calls
    bench.run()
    assert bench.vm.num_calls == calls


def test_a_slot_used_again_needs_no_driver_call() -> None:
    bench = Bench(memory=MemoryConfig(enable_prefix_caching=False))
    bench.engine.submit(ask("a", 90, 30))
    bench.run()
    calls = bench.vm.num_calls
    bench.engine.submit(ask("b", 80, 40))
    bench.run()
    assert bench.vm.num_calls == calls
    bench.assert_idle()


def test_a_prompt_finds_its_memory_prepared() -> None:
    """While one is served, an empty slot is prepared for the next one, of up to a step's tokens."""
    bench = Bench(128, scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64))
    serve(bench, [ask("a", 60, 12)])
    bench.pool.chunks.receive(wait=True)
    calls = bench.vm.num_calls
    serve(bench, [ask("b", 55, 4)])
    assert bench.vm.num_calls == calls
    bench.pool.chunks.receive(wait=True)
    calls = bench.vm.num_calls
    serve(bench, [ask("c", 50, 10)])
    assert bench.vm.num_calls == calls


def test_activations_are_lent_to_kv_in_elastic_mode_only() -> None:
    """A large prefill backs the arena; a sequence that then needs every chunk gets the arena's tail."""
    held = {}
    for mode in ("elastic", "virtual"):
        config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64)
        bench = Bench(64, MemoryConfig(mode=mode), config)  # type: ignore[arg-type]
        for index in range(8):
            bench.engine.submit(ask(f"r{index}", 50, 150))
        most = 0
        while bench.engine.step():
            most = max(most, bench.engine.snapshot.memory.kv)
        held[mode] = most
        bench.assert_idle()
    assert held["elastic"] > held["virtual"]


def test_a_static_engine_runs_as_many_sequences_as_it_has_slots() -> None:
    """Everything is set aside, so that little else is free: sequences need nothing of it."""
    limits = SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=64)
    bench = Bench(6 * 32 + 12, MemoryConfig(mode="static"), limits)
    for i in range(6):
        bench.engine.submit(ask(f"r{i}", 4, 20))
    bench.engine.step()
    assert bench.engine.snapshot.num_running == 6
    bench.run()
    bench.assert_idle()


@pytest.mark.parametrize("call", ["create", "map", "access", "unmap", "release"])
@pytest.mark.parametrize("ahead", [0, 40])
@pytest.mark.parametrize("times", [1, None])
def test_a_refusing_driver_fails_requests_and_never_the_engine(
    call: str, ahead: int, times: int | None
) -> None:
    """One refusal costs at most one request; a driver that goes on refusing loses no chunk either."""
    vm = FailingVirtualMemory(CHUNK_BYTES, 64)
    bench = Bench(64, MemoryConfig(map_ahead_tokens=ahead), vm=vm)
    serve(bench, [ask("before", 40, 10)])
    bench.engine.trim(drop_cache=True)
    vm.refuse(call, after=2, times=times)
    requests = [ask(f"r{i}", 60, 40) for i in range(6)]
    for request in requests:
        bench.engine.submit(request)
    bench.run()
    bench.engine.trim(drop_cache=True)
    bench.run()
    failed = [bench.deltas[request.request_id].finish_reason == "error" for request in requests]
    assert vm.refusals.num_refused[call] > 0 or call == "unmap"
    assert sum(failed) <= (1 if times else 6)
    for request, has_failed in zip(requests, failed, strict=True):
        if not has_failed:
            expect(bench, request)
    bench.assert_idle()
    vm.allow()
    bench.pool.chunks.ask_again()
    bench.assert_idle()
    assert bench.pool.chunks.total == 64
    serve(bench, [ask("after", 40, 10)])
    bench.engine.trim(drop_cache=True)
    bench.run()
    assert bench.pool.snapshot().created == 2, "the guard and the arena's first chunk"
    vm.close()


@pytest.mark.parametrize("seed", range(5))
def test_random_refusals_in_tight_memory(seed: int) -> None:
    """Conversations while the driver refuses calls of every kind, now and then."""
    dice = random.Random(seed)
    vm = FailingVirtualMemory(CHUNK_BYTES, 60)
    bench = Bench(60, MemoryConfig(map_ahead_tokens=dice.choice([0, 40])), vm=vm)
    talk = Talk(seed)
    for _ in range(40):
        bench.engine.submit(talk.next())
        call = dice.choice(["create", "map", "access", "unmap", "release"])
        vm.refuse(call, after=dice.randrange(6), times=dice.randint(1, 3))
        for _ in range(dice.randrange(8)):
            bench.engine.step()
        bench.engine.trim(drop_cache=dice.random() < 0.3)
        bench.pool.check()
    bench.run()
    assert vm.refusals.num_refused.total() > 0
    assert sum(delta.finish_reason == "length" for delta in bench.deltas.values()) > 10
    vm.allow()
    bench.pool.chunks.ask_again()
    bench.assert_idle()
    vm.close()


def test_first_come_first_served_under_pressure() -> None:
    bench = Bench(44, scheduler=SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=64))
    for index in range(6):
        bench.engine.submit(ask(f"r{index}", 30, 20))
    order: list[str] = []
    while bench.engine.step():
        order += [name for name, d in bench.deltas.items() if d.finish_reason and name not in order]
    assert order == [f"r{index}" for index in range(6)]


def test_trim_gives_idle_memory_back_and_work_goes_on() -> None:
    bench = Bench()
    bench.engine.submit(ask("a", 100, 50))
    bench.run()
    created = bench.pool.snapshot().created
    assert bench.pool.trim(drops_cache=True) > 0
    assert bench.pool.snapshot().created == 2  # the guard and the arena's first chunk
    assert created > 2
    bench.engine.submit(ask("b", 100, 50))
    bench.run()
    expect(bench, ask("b", 100, 50))
    bench.assert_idle()


def test_a_long_prompt_on_its_way_lets_go_of_nobody_elses_chunks() -> None:
    """More is to be sent for it than may be on its way at once: decodes keep what they have."""
    pool = Bench(600, max_model_len=8192).pool
    prompt, decode = (pool.open_slot(None, TokenChain("", 32), 1) for _ in range(2))
    assert prompt is not None
    assert decode is not None
    assert pool.reserve([(prompt.slot, 1), (decode.slot, 1)], 2, 2)
    pool.ahead.grow([(decode.slot, 33)], 0)
    pool.chunks.receive(wait=True)
    for _ in range(2):  # the first time as much is sent as may be, and nothing more the second
        pool.ahead.grow([(prompt.slot, 3000), (decode.slot, 33)], 0)
        pool.chunks.take(pool.chunks.num_spare, "other")
    assert all(tensor.can_adopt(row) for tensor, row in pool.kv.missing(decode.slot, 33))


def test_prompts_leave_what_was_mapped_for_decodes_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pool full of cached prefixes nearly all that is free was mapped ahead; a prompt takes its chunks
    from the cache instead, and no decode waits for a driver call."""
    limits = SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=256)
    bench = Bench(200, MemoryConfig(map_ahead_tokens=16), limits)
    dice = random.Random(5)
    reserve, calls = bench.pool.reserve, {"decodes": [0], "prompts": [0]}

    def counted(growth: list[tuple[int, int]], num_tokens: int, num_rows: int, staged_tokens: int) -> bool:
        before = bench.vm.num_calls
        done = reserve(growth, num_tokens, num_rows, staged_tokens)
        if bench.pool.snapshot().cached > 80:
            calls["decodes" if num_tokens == num_rows else "prompts"].append(bench.vm.num_calls - before)
        return done

    monkeypatch.setattr(bench.pool, "reserve", counted)
    requests = [ask(f"r{i}", dice.randint(1, 150), dice.randint(20, 100)) for i in range(80)]
    for request in requests:
        bench.engine.submit(request)
        for _ in range(dice.randint(5, 20)):
            bench.engine.step()
    finish(bench, requests)
    assert bench.scheduler.num_preemptions == 0
    assert len(calls["decodes"]) > 300
    assert sum(calls["prompts"]) > 50, "memory was short: prompts had to map"
    assert sum(calls["decodes"]) == 0
