"""The engine loop over real host memory with a model whose KV can be checked."""

from __future__ import annotations

import random
import threading

import pytest
import torch

from engine.config import MemoryConfig, SchedulerConfig
from engine.errors import DriverError, EngineDeadError, OverloadedError, RequestError
from engine.memory.host_vmm import HostVirtualMemory
from engine.messages import PENDING_TOKEN, GenerateRequest, SamplingParams
from tests.fakes import CHUNK_BYTES, VOCAB, Bench, answer


@pytest.fixture(autouse=True, params=[0, 1])
def steps_ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Every test runs with tokens read back before the next step starts, and after."""
    monkeypatch.setattr(Bench, "steps_ahead", request.param)
    return int(request.param)


def _request(name: str, prompt_len: int, max_tokens: int, **sampling: object) -> GenerateRequest:
    prompt = tuple(random.Random(name).choices(range(1, VOCAB), k=prompt_len))
    return GenerateRequest(name, prompt, SamplingParams(max_tokens=max_tokens, **sampling))  # type: ignore[arg-type]


def _expect(bench: Bench, request: GenerateRequest) -> None:
    delta = bench.deltas[request.request_id]
    assert delta.token_ids == answer(request.prompt_token_ids, request.sampling.max_tokens)
    assert delta.finish_reason == "length"


@pytest.mark.parametrize("mode", ["elastic", "static"])
@pytest.mark.parametrize("piece", [None, 1, 5, 16])
def test_a_mixed_load_is_answered_exactly(mode: str, piece: int | None) -> None:
    config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64, prefill_piece_tokens=piece)
    bench = Bench(96, MemoryConfig(mode=mode), config)  # type: ignore[arg-type]
    requests = [_request(f"r{i}", 1 + 13 * i % 90, 1 + 7 * i % 40) for i in range(25)]
    for request in requests:
        bench.engine.submit(request)
    bench.run()
    for request in requests:
        _expect(bench, request)
    bench.assert_idle()


@pytest.mark.parametrize("mode", ["elastic", "static"])
def test_a_pool_too_small_for_all_preempts_and_loses_nothing(mode: str) -> None:
    bench = Bench(44, MemoryConfig(mode=mode))  # type: ignore[arg-type]
    requests = [_request(f"r{i}", 20, 100) for i in range(8)]
    for request in requests:
        bench.engine.submit(request)
    bench.run()
    assert bench.scheduler.num_preemptions > 0
    for request in requests:
        _expect(bench, request)
    assert bench.deltas["r0"].num_preemptions == 0, "the oldest is never preempted"
    bench.assert_idle()


def test_two_long_prompts_that_block_each_other_both_finish() -> None:
    """Each holds half of the pool while prefilling: without a victim neither could go on."""
    bench = Bench(40, scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16), max_model_len=256)
    first, second = _request("a", 150, 60), _request("b", 150, 60)
    bench.engine.submit(first)
    bench.engine.submit(second)
    bench.run()
    _expect(bench, first)
    _expect(bench, second)
    bench.assert_idle()


def test_random_cancels_leave_everything_free() -> None:
    rng = random.Random(3)
    bench = Bench(56)
    open_ids: list[str] = []
    for index in range(300):
        request = _request(f"r{index}", rng.randint(1, 120), rng.randint(1, 60))
        bench.engine.submit(request)
        open_ids.append(request.request_id)
        for _ in range(rng.randint(0, 6)):
            bench.engine.step()
            bench.pool.check()
        if rng.random() < 0.4:
            bench.engine.cancel(rng.choice(open_ids))
    bench.run()
    bench.assert_idle()
    reasons = [delta.finish_reason for delta in bench.deltas.values()]
    assert len(reasons) == 300
    assert set(reasons) == {"length", "cancelled"}


def test_a_cancel_frees_memory_within_one_step() -> None:
    bench = Bench()
    bench.engine.submit(_request("a", 100, 100))
    for _ in range(5):
        bench.engine.step()
    assert bench.engine.snapshot.memory.kv > 0
    bench.engine.cancel("a")
    bench.engine.step()
    assert bench.engine.snapshot.memory.kv == 0
    bench.assert_idle()


def test_the_next_step_is_launched_before_the_tokens_of_this_one_are_read(steps_ahead: int) -> None:
    bench = Bench()
    request = _request("a", 5, 4)
    bench.engine.submit(request)
    bench.engine.step()
    assert len(bench.runner.plans) == 1
    assert bool(bench.deltas) == (steps_ahead == 0)
    bench.engine.step()
    assert len(bench.runner.plans) == 2
    pending = bench.runner.plans[1].pieces[0].token_ids == (PENDING_TOKEN,)
    assert pending == (steps_ahead == 1)
    bench.run()
    assert len(bench.runner.plans) == 4, "the last token is known to be the last: no step is wasted"
    _expect(bench, request)


def test_a_sequence_that_stops_is_computed_once_more_at_most_and_says_nothing_more(steps_ahead: int) -> None:
    bench = Bench()
    plain = _request("plain", 5, 20)
    said = answer(plain.prompt_token_ids, 20)
    request = GenerateRequest("stops", plain.prompt_token_ids, SamplingParams(20, stop_token_ids=(said[6],)))
    bench.engine.submit(request)
    bench.run()
    assert bench.deltas["stops"].token_ids == said[:7]
    assert len(bench.runner.plans) == 7 + steps_ahead
    bench.assert_idle()


def test_an_id_used_again_at_once_gets_its_own_tokens() -> None:
    """The step in flight may still hold a token for the request that had the id before."""
    bench = Bench()
    bench.engine.submit(_request("a", 40, 50))
    for _ in range(4):
        bench.engine.step()
    bench.engine.cancel("a")
    bench.engine.step()
    assert bench.deltas.pop("a").finish_reason == "cancelled"
    again = GenerateRequest("a", (5, 6, 7), SamplingParams(max_tokens=9))
    bench.engine.submit(again)
    bench.run()
    _expect(bench, again)
    bench.assert_idle()


def test_what_is_in_flight_when_a_sequence_is_preempted_is_said(steps_ahead: int) -> None:
    """Tight pools preempt while tokens are in flight; they are neither lost nor said twice."""
    for total in range(24, 44):
        bench = Bench(total, scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=32))
        requests = [_request(f"r{i}", 3 + 7 * i, 60 + i) for i in range(6)]
        for request in requests:
            bench.engine.submit(request)
        bench.run()
        for request in requests:
            _expect(bench, request)
        bench.assert_idle()


def test_cancelling_an_unknown_or_ended_request_is_harmless() -> None:
    bench = Bench()
    bench.engine.cancel("nobody")
    bench.engine.submit(_request("a", 3, 2))
    bench.run()
    bench.engine.cancel("a")
    bench.run()
    assert bench.deltas["a"].finish_reason == "length"


def test_a_steady_decode_makes_no_driver_calls() -> None:
    bench = Bench()
    bench.engine.submit(_request("a", 33, 30))  # 33 + 30 tokens end before the next chunk begins
    bench.engine.step()
    bench.engine.step()
    calls = bench.vm.num_calls
    bench.run()
    assert bench.vm.num_calls == calls


def test_a_slot_used_again_needs_no_driver_call() -> None:
    bench = Bench()
    bench.engine.submit(_request("a", 90, 30))
    bench.run()
    calls = bench.vm.num_calls
    bench.engine.submit(_request("b", 80, 40))
    bench.run()
    assert bench.vm.num_calls == calls
    bench.assert_idle()


def test_activations_are_lent_to_kv_in_elastic_mode_only() -> None:
    """A large prefill backs the arena; a sequence that then needs every chunk gets the arena's tail."""
    held = {}
    for mode in ("elastic", "static"):
        config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64)
        bench = Bench(64, MemoryConfig(mode=mode), config)  # type: ignore[arg-type]
        for index in range(8):
            bench.engine.submit(_request(f"r{index}", 50, 150))
        most = 0
        while bench.engine.step():
            most = max(most, bench.engine.snapshot.memory.kv)
        held[mode] = most
        bench.assert_idle()
    assert held["elastic"] > held["static"]


def test_finish_reasons() -> None:
    bench = Bench()
    plain = _request("plain", 5, 20)
    said = answer(plain.prompt_token_ids, 20)
    bench.engine.submit(plain)
    bench.engine.submit(
        GenerateRequest("stops", plain.prompt_token_ids, SamplingParams(20, stop_token_ids=(said[6],)))
    )
    bench.engine.submit(_request("full", 250, 6))
    bench.run()
    assert bench.deltas["plain"].finish_reason == "length"
    assert bench.deltas["stops"].finish_reason == "stop"
    assert bench.deltas["stops"].token_ids == said[:7]
    assert len(bench.deltas["full"].token_ids) == 6


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (GenerateRequest("x", ()), "prompt"),
        (GenerateRequest("x", (VOCAB,)), "prompt"),
        (GenerateRequest("x", (-1,)), "prompt"),
        (GenerateRequest("x", (1,) * 300), "prompt"),
        (GenerateRequest("x", (1,) * 200, SamplingParams(max_tokens=57)), "max_tokens"),
        (GenerateRequest("x", (1,), SamplingParams(logit_bias=((VOCAB, 1.0),))), "logit_bias"),
        (GenerateRequest("x", (1,), SamplingParams(stop_token_ids=(-5,))), "stop_token_ids"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(request_: GenerateRequest, param: str) -> None:
    bench = Bench()
    with pytest.raises(RequestError) as caught:
        bench.engine.submit(request_)
    assert caught.value.param == param
    bench.run()
    bench.assert_idle()


def test_a_full_queue_is_overload() -> None:
    bench = Bench(scheduler=SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=64, max_num_queued_reqs=2))
    for name in "abc":  # at once: one will run and two wait
        bench.engine.submit(_request(name, 3, 3))
    with pytest.raises(OverloadedError) as caught:
        bench.engine.submit(_request("d", 3, 3))
    assert caught.value.retry_after_s >= 1
    bench.run()
    bench.engine.submit(_request("e", 3, 3))
    bench.run()
    assert sorted(bench.deltas) == ["a", "b", "c", "e"]
    assert bench.deltas["e"].finish_reason == "length"


class FailingVirtualMemory(HostVirtualMemory):
    """Host memory whose driver starts to refuse one of its calls."""

    refuse: str | None = None

    def create(self) -> int:
        if self.refuse == "create":
            raise DriverError("create", "no memory")
        return super().create()

    def map(self, address: int, handles: object) -> None:
        if self.refuse == "map":
            raise DriverError("map", "no mapping")
        super().map(address, handles)  # type: ignore[arg-type]


@pytest.mark.parametrize("call", ["create", "map"])
def test_a_refusing_driver_fails_requests_and_never_the_engine(call: str) -> None:
    vm = FailingVirtualMemory(CHUNK_BYTES, 64)
    bench = Bench(64, vm=vm)
    bench.engine.submit(_request("before", 40, 10))
    bench.run()
    vm.refuse = call
    requests = [_request(f"r{i}", 60, 40) for i in range(6)]
    for request in requests:
        bench.engine.submit(request)
    bench.run()
    for request in requests:
        delta = bench.deltas[request.request_id]
        assert delta.finish_reason in ("length", "error")
        if delta.finish_reason == "length":
            _expect(bench, request)
    bench.assert_idle()
    vm.refuse = None
    bench.pool.chunks.ask_again()
    bench.assert_idle()
    assert bench.pool.chunks.total == 64
    bench.engine.submit(_request("after", 40, 10))
    bench.run()
    _expect(bench, _request("after", 40, 10))


def test_running_out_of_device_memory_fails_the_newest_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    old, new = _request("old", 5, 30), _request("new", 5, 30)
    bench.engine.submit(old)
    for _ in range(5):
        bench.engine.step()
    bench.engine.submit(new)
    bench.engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(bench.runner, "synchronize", lambda: None)
        patch.setattr(bench.runner, "run", _out_of_memory)
        bench.engine.step()
    bench.run()
    assert bench.deltas["new"].finish_reason == "error"
    assert "out of memory" in (bench.deltas["new"].error or "")
    _expect(bench, old)
    bench.assert_idle()


def test_one_sequence_with_broken_logits_fails_alone() -> None:
    bench = Bench()
    good, bad = _request("good", 20, 20), _request("bad", 20, 20)
    bench.engine.submit(good)
    bench.engine.submit(bad)
    for _ in range(4):
        bench.engine.step()
    bench.sampler.broken.add("bad")
    bench.run()
    assert bench.deltas["bad"].error == "not finite"
    _expect(bench, good)
    bench.assert_idle()


def _out_of_memory(plan: object) -> torch.Tensor:
    raise torch.OutOfMemoryError("no room for temporaries")


def test_a_dead_loop_tells_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    bench.engine.submit(_request("a", 5, 30))
    bench.engine.step()
    bench.engine.submit(_request("queued", 5, 30))

    def broken(plan: object) -> torch.Tensor:
        raise RuntimeError("device lost")

    monkeypatch.setattr(bench.runner, "run", broken)
    bench.engine.run_until(threading.Event())
    for name in ("a", "queued"):
        assert bench.deltas[name].finish_reason == "error"
        assert "device lost" in (bench.deltas[name].error or "")
    with pytest.raises(EngineDeadError, match="device lost"):
        bench.engine.submit(_request("late", 5, 5))
    with pytest.raises(EngineDeadError):
        bench.engine.check_alive()


def test_stopping_the_loop_ends_open_requests() -> None:
    bench = Bench()
    stop = threading.Event()
    thread = threading.Thread(target=bench.engine.run_until, args=(stop,))
    thread.start()
    bench.engine.submit(_request("a", 5, 251))
    stop.set()
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert bench.deltas["a"].finish_reason in ("error", "length")


def test_first_come_first_served_under_pressure() -> None:
    bench = Bench(44, scheduler=SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=64))
    for index in range(6):
        bench.engine.submit(_request(f"r{index}", 30, 20))
    order: list[str] = []
    while bench.engine.step():
        order += [name for name, d in bench.deltas.items() if d.finish_reason and name not in order]
    assert order == [f"r{index}" for index in range(6)]


def test_trim_gives_idle_memory_back_and_work_goes_on() -> None:
    bench = Bench()
    bench.engine.submit(_request("a", 100, 50))
    bench.run()
    created = bench.pool.snapshot().created
    assert bench.pool.trim() > 0
    assert bench.pool.snapshot().created == 2  # the guard and the arena's first chunk
    assert created > 2
    bench.engine.submit(_request("b", 100, 50))
    bench.run()
    _expect(bench, _request("b", 100, 50))
    bench.assert_idle()
