"""Step times are learnt from steps, and follow them when they change."""

from __future__ import annotations

import random

import pytest

from engine.messages import Piece, StepPlan
from engine.step_times import StepTimes, StepWork


def _true_s(work: StepWork) -> float:
    return (
        7e-3 + work.prompt_tokens * 27e-6 + work.context * 44e-9 + work.pairs * 0.95e-9 + work.decodes * 2e-6
    )


def _some(dice: random.Random) -> StepWork:
    tokens, decodes = dice.choice([0, 0, dice.randrange(8192)]), dice.randrange(64)
    return StepWork(tokens, decodes, decodes * dice.randrange(100, 16_000), tokens * dice.randrange(16_000))


def test_it_learns_what_each_part_costs() -> None:
    times, dice = StepTimes(), random.Random(1)
    assert not times.is_fitted
    for _ in range(300):
        work = _some(dice)
        times.observe(work, _true_s(work) * dice.uniform(0.97, 1.03))
    assert times.is_fitted
    for work in (StepWork(0, 32, 256_000), StepWork(2048, 16, 128_000, 4e6), StepWork(8000, 0, 0, 3.2e7)):
        assert times.predict(work) == pytest.approx(_true_s(work), rel=0.05)
    assert times.per_prompt_token(4000.0) == pytest.approx(27e-6 + 4000 * 0.95e-9, rel=0.1)


def test_it_follows_a_device_that_slows_down() -> None:
    times, dice = StepTimes(), random.Random(2)
    for factor in (1.0, 1.5):
        for _ in range(1500):
            work = _some(dice)
            times.observe(work, factor * _true_s(work))
    assert times.predict(StepWork(1000, 8, 64_000, 1e6)) == pytest.approx(
        1.5 * _true_s(StepWork(1000, 8, 64_000, 1e6)), rel=0.03
    )


def test_a_day_of_steps_that_are_all_alike_does_no_harm() -> None:
    times, work = StepTimes(), StepWork(0, 16, 100_000)
    for _ in range(20_000):
        times.observe(work, _true_s(work))
    assert times.predict(work) == pytest.approx(_true_s(work), rel=1e-3)
    assert 0.0 <= times.predict(StepWork(512, 16, 100_000, 1e5)) < 1.0


def test_prompts_that_come_in_spells_are_known_throughout() -> None:
    """Nothing may grow while no step looks there: rounding did, and a group that was believed to take a day
    for a prompt got none any more, by which it could have learnt better.
    """
    times, dice, decodes, context = StepTimes(), random.Random(3), 5, 3000
    for at in range(20_000):
        is_quiet = at // 300 % 2 == 1
        tokens = 0 if is_quiet or dice.random() < 0.9 else dice.randrange(50, 2000)
        if not is_quiet:
            decodes = max(1, min(80, decodes + dice.choice((-1, 0, 0, 0, 1))))
        context = context + decodes if is_quiet and at % 97 else decodes * 600
        work = StepWork(tokens, decodes, context, tokens * tokens / 2)
        times.observe(work, _true_s(work) * dice.uniform(0.999, 1.001))
        if at > 300:
            assert times.per_prompt_token(0.0) == pytest.approx(27e-6, rel=0.3), at


def test_no_prediction_is_negative() -> None:
    times = StepTimes()
    for tokens in range(1, 20):
        times.observe(StepWork(prompt_tokens=tokens * 100), 1.0 - tokens * 0.04)
    assert times.predict(StepWork(prompt_tokens=10_000)) == 0.0
    assert times.per_prompt_token(0.0) == 0.0


def test_the_work_of_a_plan() -> None:
    decodes = tuple(Piece(f"d{at}", at, at, 100 * at, (1,), True) for at in (1, 2))
    prompt = Piece("p", 3, 3, 50, (1,) * 20, False)
    assert StepWork.of(StepPlan(1, (*decodes, prompt), 2)) == StepWork(20, 2, 300, 20 * 60.0)
