"""Breaches of promises change how much new prompts may take, slowly and one way at a time (eLLM 4.3)."""

from __future__ import annotations

import pytest

from engine.config import SchedulerConfig
from engine.errors import ConfigError
from engine.feedback import Feedback

LATE_NEXT, LATE_FIRST, IN_TIME, BOTH = (True, False), (False, True), (False, False), (True, True)


def _after(*steps: tuple[bool, bool], dwell: int = 0) -> Feedback:
    feedback = Feedback(SchedulerConfig(feedback_dwell_steps=dwell))
    for step in steps:
        feedback.step(*step)
    return feedback


def test_three_late_steps_of_five_halve_it() -> None:
    assert _after(LATE_NEXT, IN_TIME, LATE_NEXT).share == 1.0
    assert _after(LATE_NEXT, IN_TIME, LATE_NEXT, IN_TIME, LATE_NEXT).share == 0.5
    assert _after(LATE_NEXT, IN_TIME, LATE_NEXT, IN_TIME, IN_TIME, LATE_NEXT).share == 1.0


def test_late_first_tokens_double_it_up_to_all() -> None:
    halved = [LATE_NEXT] * 6
    assert _after(*halved).share == 0.25
    assert _after(*halved, *[LATE_FIRST] * 3).share == 0.5
    assert _after(*halved, *[LATE_FIRST] * 30).share == 1.0


def test_next_tokens_come_first_when_both_are_late() -> None:
    assert _after(*[BOTH] * 3).share == 0.5
    assert _after(*[LATE_NEXT] * 3, BOTH, LATE_FIRST, LATE_FIRST, LATE_FIRST).share == 0.5


def test_it_rests_after_a_change() -> None:
    assert _after(*[LATE_NEXT] * 22, dwell=20).share == 0.5
    assert _after(*[LATE_NEXT] * 24, dwell=20).share == 0.25


def test_it_never_closes_for_good_and_says_what_it_decided() -> None:
    feedback = Feedback(SchedulerConfig(feedback_dwell_steps=0))
    decisions = [feedback.step(*LATE_NEXT) for _ in range(30)]
    assert feedback.share == 1 / 16
    assert decisions.count("deflate") == 4
    assert [feedback.step(*LATE_FIRST) for _ in range(5)].count("inflate") == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"feedback_breaches": 6},
        {"feedback_breaches": 0},
        {"feedback_factor": 1.0},
        {"feedback_dwell_steps": -1},
    ],
)
def test_settings_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SchedulerConfig(**wrong)  # type: ignore[arg-type]
