"""The forecast of an answer's length: what others had beyond this one's, cut short or ended by themselves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.answer_lengths import AnswerLengths


def lengths(*answers: tuple[int, bool]) -> AnswerLengths:
    made = AnswerLengths()
    for num_tokens, stopped in answers:
        made.ended(num_tokens, stopped)
    return made


def test_until_some_have_ended_half_of_what_may_come_is_expected() -> None:
    assert lengths().num_left(10, 100) == 50
    assert lengths(*[(40, True)] * 7).num_left(10, 100) == 50
    assert lengths(*[(40, True)] * 8).num_left(10, 100) == 30


def test_only_longer_answers_say_how_a_long_one_goes_on() -> None:
    mixed = lengths(*[(20, True)] * 8, *[(100, True)] * 8)
    assert mixed.num_left(10, 1000) == 50
    assert mixed.num_left(20, 1000) == 80
    assert mixed.num_left(100, 1000) == 500, "none is known that was longer"


def test_answers_that_were_cut_short_would_have_gone_on() -> None:
    """A start-up test of 16 tokens each said that answers end at 16; then everybody seemed to be late."""
    assert lengths(*[(16, False)] * 32).num_left(100, 400) == 200
    assert lengths(*[(512, False)] * 32).num_left(100, 412) == 412
    assert lengths(*[(50, False)] * 8, *[(50, True)] * 8).num_left(10, 1000) == 80


def test_old_answers_are_forgotten() -> None:
    assert lengths(*[(500, True)] * 100, *[(50, True)] * 64).num_left(20, 1000) == 30


@given(
    st.lists(st.tuples(st.integers(1, 300), st.booleans()), max_size=100),
    st.integers(0, 300),
    st.integers(0, 300),
)
def test_a_forecast_is_within_what_may_come(answers: list[tuple[int, bool]], had: int, most: int) -> None:
    left = lengths(*answers).num_left(had, most)
    assert 0 <= left <= most
    longer = [num_tokens - had for num_tokens, _ in answers[-64:] if num_tokens > had]
    if len(longer) >= 8:
        assert left >= min(most, sum(longer) / len(longer)) - 1e-9


def test_a_forecast_is_the_mean_if_all_stopped() -> None:
    assert lengths(*[(n, True) for n in range(1, 41)]).num_left(20, 1000) == pytest.approx(10.5)
