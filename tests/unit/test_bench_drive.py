"""The driver of engines in process, with an engine that needs no model: the clock, the books, sessions."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.bench.named import ChatPlan
from cluster.bench.summary import summarise
from cluster.bench.workload import PlannedRequest, RandomPlan, Workload
from engine.config import MIB, EngineConfig, MemoryConfig, ModelSource, SchedulerConfig
from engine.messages import EngineSnapshot, MemorySnapshot
from tests.bench import run_engine
from tests.bench.engine_options import EngineOptions
from tests.bench.in_process import BallonetStepper, Filled, drive, wait_for_balloon
from tests.bench.models import LLAMA_8B
from tests.bench.step_watch import Gain

CHATS = ChatPlan(num_chats=2, num_turns=3, turn_tokens=16, seed=4, vocab_size=3000)


class Clock:
    """Seconds that pass only when somebody works or sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class SteadyEngine:
    """One token for each open request a step of one second: its request's number, then one more each time.

    `fails` names a request that ends in an error.
    """

    snapshot = None
    steps_ahead = 0

    def __init__(self, clock: Clock, fails: str | None = None, idle: bool = False) -> None:
        self.clock, self.fails, self.idle = clock, fails, idle
        self.prompts: dict[str, list[int]] = {}
        self.left: dict[str, int] = {}
        self.said: dict[str, int] = {}
        self.gained: list[Gain] = []

    @property
    def num_running(self) -> int:
        return len(self.left)

    def submit(self, request_id: str, prompt: list[int], output_tokens: int) -> None:
        self.prompts[request_id], self.left[request_id] = prompt, output_tokens
        self.said[request_id] = int(request_id)

    def step(self) -> bool:
        if not self.left or self.idle:
            return False
        self.clock.now += 1.0
        for name in list(self.left):
            self.left[name] -= 1
            error = "it broke" if name == self.fails else None
            finished = self.left[name] == 0 or error is not None
            self.gained.append(Gain(name, (self.said[name],), finished, error, self.clock.now))
            self.said[name] += 1
            if finished:
                del self.left[name]
        return True

    def gains(self) -> list[Gain]:
        gained, self.gained = self.gained, []
        return gained


class GrowingEngine(SteadyEngine):
    """An idle engine that makes two chunks of its balloon a step, up to a number of them."""

    def __init__(self, clock: Clock, wanted: int, refused_at: int = 1 << 30) -> None:
        super().__init__(clock)
        self.memory = MemorySnapshot(
            chunk_bytes=1 << 30, total=9, free=9, kv=0, cached=0, activation=0, guard=0, retiring=0, warm=0,
            created=0, kv_tokens=0, driver_calls=0, balloon_logical=wanted,
        )  # fmt: skip
        self.refused_at = refused_at

    @property
    def snapshot(self) -> EngineSnapshot:  # type: ignore[override]
        return EngineSnapshot("m", 0.0, 0, 0, 0, 0, 0, 0, (), 0.0, self.memory)

    def step(self) -> bool:
        self.clock.now += 1.0
        there = min(self.memory.balloon_physical + 2, self.memory.balloon_logical, self.refused_at)
        self.memory = replace(self.memory, balloon_physical=there)
        return False


def test_the_balloon_is_waited_for() -> None:
    clock = Clock()
    filled = wait_for_balloon(GrowingEngine(clock, wanted=5), 5.0, clock, clock.sleep)
    assert filled is not None
    assert filled == Filled(5.0, 5.0, filled.wait_s)
    assert str(filled) == "a balloon of 5.0 GiB, waited for 3.0 s"


def test_a_balloon_that_is_refused_is_waited_for_no_longer() -> None:
    clock = Clock()
    filled = wait_for_balloon(GrowingEngine(clock, wanted=50, refused_at=4), 50.0, clock, clock.sleep)
    assert filled is not None
    assert (filled.gib, filled.wanted_gib) == (4.0, 50.0)
    assert 20 < filled.wait_s < 25
    assert "4.0 GiB of 50.0, and grows no further" in str(filled)


def test_who_has_no_balloon_waits_for_none() -> None:
    clock = Clock()
    assert wait_for_balloon(SteadyEngine(clock), 5.0, clock, clock.sleep) is None
    assert wait_for_balloon(GrowingEngine(clock, wanted=0), 5.0, clock, clock.sleep) is None
    assert clock.now == 100.0


def test_a_request_counts_from_when_it_is_due() -> None:
    clock = Clock()
    requests = (PlannedRequest(0.0, 1, 3), PlannedRequest(0.5, 1, 2), PlannedRequest(10.0, 1, 1))
    driven = drive(SteadyEngine(clock), Workload("w", requests, 0), clock, clock.sleep)
    records = driven.records
    assert [record.start_s for record in records] == [0.0, 0.5, 10.0]
    assert records[0].delta_times_s == [1.0, 2.0, 3.0]
    assert records[1].delta_times_s == [2.0, 3.0]  # due half-way through the first step
    assert records[1].ttft_s == 1.5
    assert records[2].delta_times_s == [11.0]  # the driver slept until it was due
    assert driven.duration_s == 11.0
    assert summarise(records, driven.duration_s).output_tokens == 6


def test_prompts_are_the_workloads() -> None:
    clock = Clock()
    engine, workload = SteadyEngine(clock), RandomPlan(2, 7, 1, seed=9).workload("w")
    drive(engine, workload, clock, clock.sleep)
    assert engine.prompts == {str(i): workload.token_ids(r) for i, r in enumerate(workload.requests)}


def test_a_failed_request_is_a_failed_record() -> None:
    clock = Clock()
    workload = Workload("w", (PlannedRequest(0.0, 1, 3), PlannedRequest(0.0, 1, 3)), 0)
    records = drive(SteadyEngine(clock, fails="1"), workload, clock, clock.sleep).records
    assert [record.succeeded for record in records] == [True, False]
    assert records[1].error == "it broke"


def test_a_turn_goes_on_from_the_tokens_of_the_answer_before_it() -> None:
    clock = Clock()
    engine, workload = SteadyEngine(clock), CHATS.workload("w")
    driven = drive(engine, workload, clock, clock.sleep)
    fresh = [workload.token_ids(request) for request in workload.requests]
    # Two tokens an answer: of request n they are n and n + 1.
    assert engine.prompts["3"] == [*fresh[1], 1, 2, *fresh[3]]
    assert engine.prompts["5"] == [*fresh[1], 1, 2, *fresh[3], 3, 4, *fresh[5]]
    assert [record.prompt_tokens for record in driven.records] == [14, 14, 30, 30, 46, 46]
    assert [record.start_s for record in driven.records] == [0, 0, 2, 2, 4, 4]
    assert {record.ttft_s for record in driven.records} == {1.0}


def test_a_turn_waits_for_its_reader() -> None:
    clock = Clock()
    requests = (PlannedRequest(1.0, 1, 2), PlannedRequest(0.0, 4, 1, follows=0, think_s=5.0))
    driven = drive(SteadyEngine(clock), Workload("w", requests, 0), clock, clock.sleep)
    assert [record.start_s for record in driven.records] == [1.0, 8.0]
    assert driven.duration_s == 9.0


def test_turns_behind_a_failed_one_fail_with_its_reason() -> None:
    clock = Clock()
    driven = drive(SteadyEngine(clock, fails="1"), CHATS.workload("w"), clock, clock.sleep)
    unsent = "not sent, for the turn before it failed: it broke"
    errors = [record.error for record in driven.records]
    assert errors == [None, "it broke", None, unsent, None, unsent]
    assert summarise(driven.records, driven.duration_s).failed == 3


def test_nothing_is_submitted_after_the_time_given() -> None:
    clock = Clock()
    workload = RandomPlan(10, 3, 4, request_rate=1.0, seed=2).workload("w")
    driven = drive(SteadyEngine(clock), workload, clock, clock.sleep, submit_for_s=5.0)
    in_time = [request for request in workload.requests if request.arrival_s < 5.0]
    assert 0 < len(in_time) < 10
    assert list(driven.workload.requests) == in_time
    assert [record.output_tokens for record in driven.records] == [4] * len(in_time)  # to their ends


def test_sessions_end_at_the_time_given_too() -> None:
    clock = Clock()
    driven = drive(SteadyEngine(clock), CHATS.workload("w"), clock, clock.sleep, submit_for_s=3.0)
    assert [request.follows for request in driven.workload.requests] == [None, None, 0, 1]
    assert driven.duration_s == 4.0


def _tiny(folder: Path) -> BallonetStepper:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 3000}
    (folder / "config.json").write_text(json.dumps(LLAMA_8B | sizes))
    source = ModelSource("tiny", str(folder), load_format="dummy", dtype="float32")
    memory, limits = MemoryConfig(pool_bytes=32 * MIB), SchedulerConfig(max_num_seqs=2)
    return BallonetStepper(EngineConfig(source, memory, limits, max_model_len=256))


def test_our_engine_is_driven_to_the_end(tmp_path: Path) -> None:
    workload = RandomPlan(3, 20, 5, vocab_size=3000).workload("w")
    driven = drive(_tiny(tmp_path), workload)
    assert [record.error for record in driven.records] == [None] * 3
    assert [record.output_tokens for record in driven.records] == [5] * 3
    assert all(0 < record.ttft_s <= record.e2el_s <= driven.duration_s for record in driven.records)
    assert driven.steps["memory"]["max_kv_gib"] > 0
    assert driven.steps["steps"]["max_running"] == 2


def test_sessions_of_our_engine_find_what_they_said(tmp_path: Path) -> None:
    """Turns of 16 tokens behind one of 128: a block of KV is full by then, and not computed again."""
    fresh = (PlannedRequest(0.0, 128, 8, (("a", 128),)), PlannedRequest(0.0, 152, 8, (("b", 16),), follows=0))
    driven = drive(_tiny(tmp_path), Workload("w", fresh, seed=1, vocab_size=3000))
    assert [record.error for record in driven.records] == [None, None]
    assert [record.prompt_tokens for record in driven.records] == [128, 152]
    cached = driven.records[1].cached_tokens
    assert cached is not None
    assert cached >= 64
    assert driven.steps["memory"]["prefix_hits"] == cached


def test_an_engine_that_forgets_a_request_is_found_out() -> None:
    clock = Clock()
    workload = Workload("w", (PlannedRequest(0.0, 1, 1),), 0)
    with pytest.raises(RuntimeError, match="1 requests are open"):
        drive(SteadyEngine(clock, idle=True), workload, clock, clock.sleep)


def test_only_a_balloon_whose_size_is_given_on_a_gpu_is_waited_for() -> None:
    gpu, cpu = Namespace(model="llama-8b"), Namespace(model="demo")
    given, own = EngineOptions(balloon_gib=5.0), EngineOptions()
    told = run_engine._filled_balloon(GrowingEngine(Clock(), wanted=5), gpu, given)
    assert told is not None
    assert (told["gib"], told["wanted_gib"]) == (5.0, 5.0)
    for args, options in ((gpu, own), (cpu, given), (gpu, EngineOptions(balloon_gib=0.0))):
        engine = GrowingEngine(Clock(), wanted=5)
        assert run_engine._filled_balloon(engine, args, options) is None
        assert engine.memory.balloon_physical == 0
