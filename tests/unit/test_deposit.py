"""Tokens that are ahead of their clients: handed out in order, when they are due, and never kept for good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import MemoryConfig, SchedulerConfig
from engine.deposit import Deposit
from engine.messages import FinishReason, TokenDelta
from engine.outlet import Outlet
from engine.simulated import VirtualClock
from tests.fakes import Bench, Collected
from tests.unit.engine_cases import ask, finish
from tests.unit.parking_cases import filled, num_parkings

NOBODY: list[tuple[TokenDelta, float]] = []


def said(name: str, *tokens: int, end: FinishReason | None = None) -> TokenDelta:
    return TokenDelta(name, tokens, finish_reason=end)


def test_a_token_that_is_due_goes_out_at_once() -> None:
    deposit = Deposit()
    first = said("a", 1)
    assert deposit.pass_on([(first, 10.0)], 10.0, holds_back=True) == [first]
    assert deposit.num_tokens == 0


def test_a_token_goes_out_when_it_is_due_and_not_before() -> None:
    deposit = Deposit()
    assert deposit.pass_on([(said("a", 1), 10.0)], 5.0, holds_back=True) == []
    assert deposit.num_tokens == 1
    assert deposit.pass_on(NOBODY, 9.99, holds_back=True) == []
    assert deposit.pass_on(NOBODY, 10.0, holds_back=True) == [said("a", 1)]
    assert deposit.num_tokens == 0
    assert deposit.pass_on(NOBODY, 99.0, holds_back=True) == []


def test_tokens_that_are_due_together_go_out_as_one_delta() -> None:
    deposit = Deposit()
    for token in range(5):
        assert deposit.pass_on([(said("a", token), 10.0 + token)], 0.0, holds_back=True) == []
    assert deposit.pass_on(NOBODY, 12.5, holds_back=True) == [said("a", 0, 1, 2)]
    assert deposit.pass_on(NOBODY, 20.0, holds_back=True) == [said("a", 3, 4)]


def test_a_late_token_waits_behind_those_of_its_request_that_are_not_due() -> None:
    """A promise may have been made shorter meanwhile: nothing overtakes."""
    deposit = Deposit()
    deposit.pass_on([(said("a", 1), 10.0)], 0.0, holds_back=True)
    assert deposit.pass_on([(said("a", 2), 1.0)], 5.0, holds_back=True) == []
    assert deposit.pass_on(NOBODY, 10.0, holds_back=True) == [said("a", 1, 2)]


def test_nobody_waits_for_the_tokens_of_another() -> None:
    deposit = Deposit()
    deposit.pass_on([(said("a", 1), 10.0), (said("b", 2), 4.0)], 0.0, holds_back=True)
    assert deposit.pass_on([(said("c", 3), 3.0)], 5.0, holds_back=True) == [said("c", 3), said("b", 2)]
    assert deposit.num_tokens == 1


@pytest.mark.parametrize("reason", ["stop", "length", "cancelled", "error"])
def test_the_end_of_a_request_takes_all_of_its_tokens_along(reason: FinishReason) -> None:
    deposit = Deposit()
    for token in range(3):
        deposit.pass_on([(said("a", token), 10.0 + token), (said("b", token), 10.0)], 0.0, holds_back=True)
    assert deposit.pass_on([(said("a", 3, end=reason), 50.0)], 1.0, holds_back=True) == [
        said("a", 0, 1, 2, 3, end=reason)
    ]
    assert deposit.num_tokens == 3
    assert deposit.pass_on(NOBODY, 99.0, holds_back=True) == [said("b", 0, 1, 2)], "and only of its own"


def test_an_end_that_was_not_due_is_not_held_back() -> None:
    deposit = Deposit()
    end = said("a", end="cancelled")
    assert deposit.pass_on([(end, 99.0)], 1.0, holds_back=True) == [end]


def test_once_nobody_is_parked_nothing_is_held() -> None:
    deposit = Deposit()
    deposit.pass_on([(said("a", 1), 10.0), (said("b", 2), 20.0)], 0.0, holds_back=True)
    out = deposit.pass_on([(said("a", 3), 30.0), (said("c", 4), 40.0)], 1.0, holds_back=False)
    assert together(out) == {"a": (1, 3), "b": (2,), "c": (4,)}
    assert deposit.num_tokens == 0
    deposit.pass_on([(said("a", 5), 50.0)], 1.0, holds_back=True)
    assert deposit.pass_on(NOBODY, 20.0, holds_back=True) == [], (
        "no time of before counts for what came later"
    )


def test_logprobs_and_counts_come_along() -> None:
    deposit = Deposit()
    deposit.pass_on([(replace(said("a", 1), num_cached_tokens=7), 10.0)], 0.0, holds_back=True)
    later = replace(said("a", 2, end="length"), num_preemptions=3, num_cached_tokens=7)
    (out,) = deposit.pass_on([(later, 11.0)], 0.0, holds_back=True)
    assert (out.num_preemptions, out.num_cached_tokens, out.finish_reason) == (3, 7, "length")


def together(deltas: Sequence[TokenDelta]) -> dict[str, tuple[int, ...]]:
    """All tokens of each request, in the order in which they went out."""
    joined: dict[str, tuple[int, ...]] = {}
    for delta in deltas:
        joined[delta.request_id] = joined.get(delta.request_id, ()) + delta.token_ids
    return joined


# (request, seconds since the last call, seconds until it is due, whether it may be the last, `holds_back`)
EVENTS = st.tuples(
    st.sampled_from("abc"), st.integers(0, 4), st.integers(-3, 12), st.booleans(), st.booleans()
)


@given(st.lists(EVENTS, max_size=60))
def test_every_token_goes_out_once_in_order_and_in_time(
    events: list[tuple[str, int, int, bool, bool]],
) -> None:
    deposit, collected = Deposit(), Collected()
    due: dict[str, list[float]] = {}
    names: dict[str, str] = {}
    now = 0
    for index, (letter, passed, until_due, is_last, holds_back) in enumerate(events):
        now += passed
        name = names.setdefault(letter, f"{letter}{index}")
        due_s = max(now + until_due, *due.get(name, [0]))
        due.setdefault(name, []).append(due_s)
        delta = said(name, len(due[name]), end="length" if is_last and until_due % 2 else None)
        if delta.finish_reason:
            del names[letter]  # what comes later is another request
        collected.take(deposit.pass_on([(delta, due_s)], now, holds_back))
        for one, times in due.items():
            out = collected[one].token_ids if one in collected else ()
            has_ended = one in collected and collected[one].finish_reason is not None
            assert out == tuple(range(1, len(out) + 1)), "in order, and each once"
            if has_ended or not holds_back:
                assert len(out) == len(times)
            assert len(out) >= sum(time <= now for time in times), "nothing that is due is held"
    assert deposit.num_tokens == sum(map(len, due.values())) - sum(
        len(delta.token_ids) for delta in collected.values()
    )


def test_an_engine_that_stops_hands_out_what_it_held() -> None:
    collected = Collected()
    outlet = Outlet(collected.take, VirtualClock())
    outlet.put([(said("a", 1), 10.0)], holds_back=True)
    assert (collected, outlet.num_deposited) == ({}, 1)
    outlet.end([said("a", end="error")])
    assert collected["a"] == said("a", 1, end="error")


def crowded_run(deposit: bool, unpaced: bool = False) -> list[int]:
    """Eight requests that take turns; the tokens held back after each step."""
    limits = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64, turn_tokens=2, deposit=deposit)
    bench = Bench(50, MemoryConfig(), limits, balloon_chunks=400)
    filled(bench.balloon)
    wishes = {"tpot_slo_s": 0.02, "ttft_slo_s": 0.01, "unpaced": unpaced}
    requests = [replace(ask(f"r{at}", 20 + 7 * at, 90), **wishes) for at in range(8)]
    for request in requests:
        bench.engine.submit(request)
    held, num_parked = [], 0
    while bench.engine.step():
        for seq in bench.scheduler.unfinished():
            assert not seq.output_token_ids or seq.request_id in bench.deltas, "a first token was held back"
        now = bench.engine.snapshot
        held.append(now.num_deposited)
        assert num_parked or now.num_parked or not held[-1], "with nobody parked nothing is held"
        num_parked = now.num_parked
    finish(bench, requests)
    assert num_parkings(bench) > 2
    return held


@pytest.mark.usefixtures("steps_ahead")
def test_while_sequences_take_turns_tokens_are_held_back_but_for_the_first() -> None:
    held = crowded_run(deposit=True)
    assert max(held) > 3
    assert held[-1] == 0


@pytest.mark.usefixtures("steps_ahead")
def test_without_a_deposit_nothing_is_ever_held() -> None:
    assert max(crowded_run(deposit=False)) == 0


@pytest.mark.usefixtures("steps_ahead")
def test_who_wants_tokens_as_soon_as_they_exist_gets_them() -> None:
    assert max(crowded_run(deposit=True, unpaced=True)) == 0


def test_an_id_that_is_used_again_inherits_no_due_time() -> None:
    deposit = Deposit()
    deposit.pass_on([(TokenDelta("a", (1,)), 5.0)], 0.0, holds_back=True)
    deposit.pass_on([(TokenDelta("a", (2,), finish_reason="length"), 6.0)], 1.0, holds_back=True)
    deposit.pass_on([(TokenDelta("a", (3,)), 100.0)], 2.0, holds_back=True)
    assert deposit.pass_on([], 6.0, holds_back=True) == []
