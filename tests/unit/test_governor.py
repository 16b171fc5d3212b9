"""Copies ahead of need give way when steps beside them take longer than others."""

from __future__ import annotations

import random

from engine.governor import Governor

MIB = 1 << 20


def _after(alone: float, beside: float, steps: int = 400) -> int:
    governor, dice = Governor(), random.Random(3)
    for step in range(steps):
        governor.step((beside if step % 2 else alone) * dice.uniform(0.98, 1.02), was_copying=step % 2 == 1)
    return governor.num_bytes(0.0)


def test_copies_that_nobody_feels_go_on() -> None:
    assert _after(1.0, 1.01) > 60 * MIB


def test_copies_that_slow_steps_down_get_smaller() -> None:
    assert _after(1.0, 1.2) == 2 * MIB


def test_what_slows_all_steps_is_not_the_copies() -> None:
    assert _after(1.3, 1.31) > 60 * MIB


def test_they_come_back_when_it_is_over() -> None:
    governor = Governor()
    for slowness in [1.3] * 100 + [1.0] * 300:
        governor.step(1.0, was_copying=False)
        governor.step(slowness, was_copying=True)
    assert governor.num_bytes(0.0) == 64 * MIB


def test_one_hiccup_is_forgotten() -> None:
    governor = Governor()
    governor.step(50.0, was_copying=True)
    for _ in range(200):
        governor.step(1.0, was_copying=True)
    assert governor.num_bytes(0.0) == 64 * MIB


def test_beside_long_steps_more_may_be_under_way() -> None:
    governor = Governor()
    assert governor.num_bytes(0.0125) == 64 * MIB
    assert governor.num_bytes(1.0) == 80 * 64 * MIB
