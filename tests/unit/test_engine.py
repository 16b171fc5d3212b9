"""The engine loop over real host memory with a model whose KV can be checked."""

from __future__ import annotations

import random
import threading
from collections import deque

import pytest
import torch

from engine.config import MemoryConfig, SchedulerConfig
from engine.errors import EngineDeadError, OverloadedError, RequestError
from engine.messages import PENDING_TOKEN, GenerateRequest, SamplingParams
from tests.fakes import VOCAB, Bench, answer
from tests.unit.engine_cases import ask, expect, serve

pytestmark = pytest.mark.usefixtures("steps_ahead")


@pytest.mark.parametrize("mode", ["elastic", "virtual", "static"])
@pytest.mark.parametrize("piece", [None, 1, 5, 16])
def test_a_mixed_load_is_answered_exactly(mode: str, piece: int | None) -> None:
    config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64, prefill_piece_tokens=piece)
    bench = Bench(96, MemoryConfig(mode=mode), config)  # type: ignore[arg-type]
    serve(bench, [ask(f"r{i}", 1 + 13 * i % 90, 1 + 7 * i % 40) for i in range(25)])


def test_random_cancels_leave_everything_free() -> None:
    rng = random.Random(3)
    bench = Bench(56)
    open_ids: list[str] = []
    for index in range(300):
        request = ask(f"r{index}", rng.randint(1, 120), rng.randint(1, 60))
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


def test_the_next_step_is_launched_before_the_tokens_of_this_one_are_read(steps_ahead: int) -> None:
    bench = Bench()
    request = ask("a", 5, 4)
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
    expect(bench, request)


def test_a_sequence_that_stops_is_computed_once_more_at_most_and_says_nothing_more(steps_ahead: int) -> None:
    bench = Bench()
    plain = ask("plain", 5, 20)
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
    bench.engine.submit(ask("a", 40, 50))
    for _ in range(4):
        bench.engine.step()
    bench.engine.cancel("a")
    bench.engine.step()
    assert bench.deltas.pop("a").finish_reason == "cancelled"
    again = GenerateRequest("a", (5, 6, 7), SamplingParams(max_tokens=9))
    bench.engine.submit(again)
    bench.run()
    expect(bench, again)
    bench.assert_idle()


def test_an_id_in_use_is_refused() -> None:
    bench = Bench()
    bench.engine.submit(ask("a", 5, 30))
    bench.engine.step()
    bench.engine.cancel("a")  # takes effect with the next step
    with pytest.raises(RequestError, match="still open"):
        bench.engine.submit(ask("a", 3, 2))
    bench.run()
    assert bench.deltas.pop("a").finish_reason == "cancelled"
    again = ask("a", 3, 2)
    bench.engine.submit(again)
    bench.run()
    expect(bench, again)


def test_everybody_is_told_of_the_end_while_others_cancel() -> None:
    class Inbox(deque[object]):
        """A cancel comes in while the orders are looked through, as from another thread."""

        def __iter__(self):  # type: ignore[no-untyped-def]
            for order in super().__iter__():
                self.append("nobody")
                yield order

    bench = Bench()
    bench.engine._inbox = Inbox()  # type: ignore[assignment]
    bench.engine.submit(ask("a", 3, 2))
    bench.engine.submit(ask("b", 3, 2))
    stop = threading.Event()
    stop.set()
    bench.engine.run_until(stop)
    assert {bench.deltas[name].finish_reason for name in ("a", "b")} == {"error"}


def test_cancelling_an_unknown_or_ended_request_is_harmless() -> None:
    bench = Bench()
    bench.engine.cancel("nobody")
    bench.engine.submit(ask("a", 3, 2))
    bench.run()
    bench.engine.cancel("a")
    bench.run()
    assert bench.deltas["a"].finish_reason == "length"


def test_finish_reasons() -> None:
    bench = Bench()
    plain = ask("plain", 5, 20)
    said = answer(plain.prompt_token_ids, 20)
    bench.engine.submit(plain)
    bench.engine.submit(
        GenerateRequest("stops", plain.prompt_token_ids, SamplingParams(20, stop_token_ids=(said[6],)))
    )
    bench.engine.submit(ask("full", 250, 6))
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
        bench.engine.submit(ask(name, 3, 3))
    with pytest.raises(OverloadedError) as caught:
        bench.engine.submit(ask("d", 3, 3))
    assert caught.value.retry_after_s >= 1
    bench.run()
    assert dict(bench.engine.snapshot.decisions)["refuse"] == 1
    bench.engine.submit(ask("e", 3, 3))
    bench.run()
    assert sorted(bench.deltas) == ["a", "b", "c", "e"]
    assert bench.deltas["e"].finish_reason == "length"


def test_running_out_of_device_memory_fails_the_newest_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    old, new = ask("old", 5, 30), ask("new", 5, 30)
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
    expect(bench, old)
    bench.assert_idle()


def test_one_sequence_with_broken_logits_fails_alone() -> None:
    bench = Bench()
    good, bad = ask("good", 20, 20), ask("bad", 20, 20)
    bench.engine.submit(good)
    bench.engine.submit(bad)
    for _ in range(4):
        bench.engine.step()
    bench.sampler.broken.add("bad")
    bench.run()
    assert bench.deltas["bad"].error == "not finite"
    expect(bench, good)
    bench.assert_idle()


def _out_of_memory(plan: object, offload: object) -> torch.Tensor:
    raise torch.OutOfMemoryError("no room for temporaries")


def test_a_dead_loop_tells_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    bench.engine.submit(ask("a", 5, 30))
    bench.engine.step()
    bench.engine.submit(ask("queued", 5, 30))

    def broken(plan: object, offload: object) -> torch.Tensor:
        raise RuntimeError("device lost")

    monkeypatch.setattr(bench.runner, "run", broken)
    bench.engine.run_until(threading.Event())
    for name in ("a", "queued"):
        assert bench.deltas[name].finish_reason == "error"
        assert "device lost" in (bench.deltas[name].error or "")
    with pytest.raises(EngineDeadError, match="device lost"):
        bench.engine.submit(ask("late", 5, 5))
    with pytest.raises(EngineDeadError):
        bench.engine.check_alive()


def test_the_loop_takes_the_device_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread has no context by itself, and the first act may be a copy, not a kernel."""
    bench = Bench()
    done: list[tuple[str, int]] = []
    vm = bench.engine._pool.chunks.vm
    monkeypatch.setattr(vm, "enter", lambda: done.append(("enter", threading.get_ident())))
    monkeypatch.setattr(
        bench.engine, "step", lambda: done.append(("step", threading.get_ident())) or stop.set()
    )
    stop = threading.Event()
    thread = threading.Thread(target=bench.engine.run_until, args=(stop,))
    thread.start()
    thread.join(timeout=10)
    assert done == [("enter", thread.ident), ("step", thread.ident)]


def test_stopping_the_loop_ends_open_requests() -> None:
    bench = Bench()
    stop = threading.Event()
    thread = threading.Thread(target=bench.engine.run_until, args=(stop,))
    thread.start()
    bench.engine.submit(ask("a", 5, 251))
    stop.set()
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert bench.deltas["a"].finish_reason in ("error", "length")
