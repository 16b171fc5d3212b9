"""Which steps count as decodes, what they took, and the memory beside them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.messages import EngineSnapshot, MemorySnapshot
from tests.bench.step_watch import Gain, StepWatch

MEMORY = MemorySnapshot(
    chunk_bytes=1 << 30, total=20, free=20, kv=0, cached=0, activation=0, guard=0, retiring=0, warm=0,
    created=0, kv_tokens=0, driver_calls=100, driver_calls_beside=7,
)  # fmt: skip
SNAPSHOT = EngineSnapshot("m", 0.0, 0, 0, 50, 3, 0, 0, (), 0.0, MEMORY, prefix_queries=10, prefix_hits=4)


def _gains(*names: str, ended: str = "") -> list[Gain]:
    return [Gain(name, (1,), name in ended, None, 0.0) for name in names]


def _watched(steps: list[tuple[float, list[Gain], int]]) -> dict[str, float]:
    watch = StepWatch(0.0, None)
    for now_s, gains, num_running in steps:
        watch.stepped(now_s, gains, num_running, None)
    figures: dict[str, float] = watch.figures()["steps"]
    return figures


def test_steps_with_a_prompt_beside_are_no_decodes() -> None:
    figures = _watched(
        [
            (1.0, _gains("a"), 2),  # the first token of a; b's prompt is computed
            (1.5, _gains("a"), 2),  # b's still
            (3.0, _gains("a", "b"), 2),  # the first token of b
            (3.25, _gains("a", "b"), 2),
            (3.75, _gains("a", "b", ended="b"), 1),
            (4.0, _gains("a", ended="a"), 0),
        ]
    )
    assert (figures["decode_steps"], figures["max_running"]) == (3, 2)
    assert (figures["decode_step_p50_ms"], figures["decode_step_max_ms"]) == (250.0, 500.0)
    assert figures["decode_tok_s"] == 5.0
    assert figures["widest_decode"] == 2
    assert figures["widest_decode_tok_s"] == pytest.approx(4 / 0.75, abs=1e-4)


def test_a_sequence_that_comes_back_is_a_prompt() -> None:
    figures = _watched(
        [
            (1.0, _gains("a", "b"), 2),
            (2.0, _gains("a"), 1),  # b was preempted
            (3.0, _gains("a", "b"), 2),  # and computed again, beside a
            (4.0, _gains("a", "b"), 2),
        ]
    )
    assert figures["decode_steps"] == 2


def test_the_wait_for_a_request_is_no_step() -> None:
    watch = StepWatch(0.0, None)
    watch.stepped(1.0, _gains("a"), 1, None)
    watch.slept(9.0)
    watch.stepped(9.5, _gains("a"), 1, None)
    assert watch.figures()["steps"]["decode_step_max_ms"] == 500.0


def test_a_hundredth_of_the_steps_is_told_by_itself() -> None:
    slow = [(0.5 if number in (70, 150) else 0.1) for number in range(200)]
    now_s, steps = 0.1, [(0.1, _gains("a"), 1)]
    for seconds in slow:
        now_s += seconds
        steps.append((now_s, _gains("a"), 1))
    figures = _watched(steps)
    assert figures["decode_step_longest_1pct_ms"] == pytest.approx(500.0)
    assert figures["decode_step_p50_ms"] == pytest.approx(100.0)


def test_a_run_without_steps_has_no_times() -> None:
    figures = _watched([])
    assert (figures["decode_steps"], figures["widest_decode"]) == (0, 0)
    assert "decode_step_p50_ms" not in figures


def test_memory_is_told_as_peaks_and_differences() -> None:
    watch = StepWatch(0.0, replace(SNAPSHOT, decisions=(("park_for_turn", 3),)))
    grown = replace(
        MEMORY, kv=6, cached=1, activation=2, driver_calls=140, driver_calls_beside=9, balloon=7,
        copied_out_bytes=5 << 30,
    )  # fmt: skip
    shrunk = replace(grown, kv=2, cached=5, driver_calls=143, driver_calls_beside=12)
    # A prompt, in whose step memory was made; a decode that made three calls.
    watch.stepped(1.0, _gains("a"), 1, replace(SNAPSHOT, num_steps=51, memory=grown, num_parked=4))
    last = replace(
        SNAPSHOT, num_steps=52, memory=shrunk, prefix_queries=110, prefix_hits=64, num_preemptions=5,
        num_parkings=9, decisions=(("return", 6), ("park_for_turn", 8)),
    )  # fmt: skip
    watch.stepped(2.0, _gains("a"), 1, last)
    assert watch.figures()["memory"] == {
        "chunk_bytes": 1 << 30,
        "pool_gib": 20.0,
        "max_kv_gib": 6.0,
        "max_cached_gib": 5.0,
        "max_activation_gib": 2.0,
        "driver_calls": 43,
        "driver_calls_beside": 5,
        "driver_calls_in_decode_steps": 3,
        "engine_steps": 2,
        "max_balloon_gib": 7.0,
        "preemptions": 2,
        "parkings": 9,
        "max_parked": 4,
        "decisions": {"return": 6, "park_for_turn": 5},
        "copied_out_gib": 5.0,
        "copied_in_gib": 0.0,
        "prefix_queries": 100,
        "prefix_hits": 60,
    }


def test_calls_for_a_step_launched_ahead_are_not_those_of_the_step_that_ends() -> None:
    watch = StepWatch(0.0, SNAPSHOT, steps_ahead=1)
    total = MEMORY.driver_calls
    # Launches the prompt of a; reads that and launches a decode; reads it and launches b's prompt beside.
    for now_s, names, num_running, calls in ((1.0, "", 1, 5), (2.0, "a", 1, 3), (3.0, "a", 2, 40)):
        total += calls
        memory = replace(MEMORY, driver_calls=total)
        watch.stepped(now_s, _gains(*names), num_running, replace(SNAPSHOT, memory=memory))
    figures = watch.figures()
    assert figures["memory"]["driver_calls"] == 48
    assert figures["memory"]["driver_calls_in_decode_steps"] == 0, "b's prompt is launched, a waits for it"
    watch.stepped(4.0, _gains("a", "b"), 2, replace(SNAPSHOT, memory=replace(memory, driver_calls=total + 2)))
    watch.stepped(5.0, _gains("a", "b"), 2, replace(SNAPSHOT, memory=replace(memory, driver_calls=total + 2)))
    assert watch.figures()["memory"]["driver_calls_in_decode_steps"] == 2


def test_a_rival_has_no_memory_to_tell() -> None:
    assert set(StepWatch(0.0, None).figures()) == {"steps"}
