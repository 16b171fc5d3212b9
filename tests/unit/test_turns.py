"""Who gives its place on the device to whom: by runway and slack, prompts first, a whole turn at a time."""

from __future__ import annotations

import math

import pytest

from engine.config import SchedulerConfig
from engine.memory.blocks import TokenChain
from engine.messages import GenerateRequest, SamplingParams
from engine.sequence import Sequence, State
from engine.turns import Turns
from tests.fakes import Bench
from tests.unit.engine_cases import tokens
from tests.unit.parking_cases import GROUPS, OUT, T, Yard

TPOT_S = 0.1
TURN = 8
TURN_S = TURN * TPOT_S


class Stage:
    """A pool with room for a few, sequences that run in it, and their turns.

    Args:
        total, host: chunks of the pool and of the balloon.
    """

    def __init__(self, total: int = 120, host: int = 200, policy: str = "slo") -> None:
        config = SchedulerConfig(max_num_seqs=8, turn_tokens=TURN, min_retained_chunks=0, policy=policy)  # type: ignore[arg-type]
        self.yard = Yard(total, host)
        self.turns = Turns(config, self.yard.pool)
        self.active: list[Sequence] = []

    def runs(
        self, name: str, num_rows: int = 2, outputs: int = 10, first_s: float = 0.0, max_tokens: int = 20
    ) -> Sequence:
        """A sequence that decodes: it is `first_s + outputs * TPOT_S` ahead of time 0."""
        guest = self.yard.guest(num_rows * T)
        prompt, said = guest.known[: num_rows * T + 1 - outputs], guest.known[-outputs:]
        request = GenerateRequest(name, tuple(prompt), SamplingParams(max_tokens=max_tokens))
        seq = Sequence(request, 0, 0.0, guest.chain, tpot_slo_s=TPOT_S, first_token_s=first_s)
        seq.state, seq.slot, seq.backing = State.RUNNING, guest.slot, guest.backing
        seq.num_computed = seq.num_written = num_rows * T
        seq.output_token_ids = list(said)
        self.active.append(seq)
        return seq

    def park(self, seq: Sequence, num_chunks: int = 1000, settles: bool = True) -> Sequence:
        assert self.turns.park(seq, num_chunks, "park_for_turn")
        self.active.remove(seq)
        if settles:
            self.yard.settle()
        return seq

    def victims(self, lacking: int = 0, now_s: float = 0.0) -> dict[str, int]:
        """Whom to park, the first first, and how many chunks each should free."""
        chosen = self.turns.victims(now_s, self.active, self.active, lacking)
        return {seq.request_id: num_chunks for seq, num_chunks, _ in chosen}

    def brings_back(self, lacking: int = 0, now_s: float = 0.0) -> str | None:
        """Who is on the way back after that, and was not before."""
        before = self.coming
        self.turns.bring_back(now_s, lacking, self.active)
        return None if self.coming == before else self.coming

    @property
    def coming(self) -> str | None:
        there = [seq.request_id for seq in self.turns.parked if seq.backing.coming is not None]
        return there[0] if there else None

    def finished(self, *lengths: int) -> None:
        """Requests of such lengths have been answered."""
        for length in lengths:
            self.turns.finished(sequence(outputs=length), 0.0, stopped=True)


def sequence(
    outputs: int, max_tokens: int = 100, in_flight: int = 0, first_s: float | None = 5.0
) -> Sequence:
    """A sequence by itself, whose client is promised a token each 0.1 s."""
    request = GenerateRequest("r", tokens("r", 10), SamplingParams(max_tokens=max_tokens))
    seq = Sequence(
        request, 0, 1.0, TokenChain("", T), ttft_slo_s=2.0, tpot_slo_s=TPOT_S, first_token_s=first_s
    )
    seq.output_token_ids, seq.num_in_flight = [1] * outputs, in_flight
    return seq


# Runway and slack


@pytest.mark.parametrize(
    ("outputs", "in_flight", "first_s", "runway_s"),
    [
        (1, 0, 5.0, 0.1),  # the second token is due 0.1 s after the first
        (1, 1, 5.0, 0.2),
        (21, 0, 5.0, 2.1),
        (21, 2, 5.0, 2.3),
        (0, 0, None, 1.0 + 2.0 + 0.1 - 5.0),  # the first is due 2 s after it came
    ],
)
def test_the_runway_ends_when_the_client_waits(
    outputs: int, in_flight: int, first_s: float | None, runway_s: float
) -> None:
    turns, seq = Stage().turns, sequence(outputs, in_flight=in_flight, first_s=first_s)
    assert turns.runway_s(seq, 5.0) == pytest.approx(runway_s)
    assert turns.runway_s(seq, 6.5) == pytest.approx(runway_s - 1.5)


def test_slack_is_runway_and_what_the_rest_of_the_answer_makes_up() -> None:
    """Until enough requests have ended, half of what it may generate is expected."""
    turns, seq = Stage().turns, sequence(20, max_tokens=100)
    assert turns.slack_s(seq, 5.0) == pytest.approx(2.0 + 40 * TPOT_S), "steps that take no time make all up"


def test_slow_steps_make_up_little_and_take_nothing() -> None:
    for step_s, gained_s in ((0.05, 40 * 0.05), (0.3, 0.0)):
        stage, seq = Stage(), sequence(20, max_tokens=100)
        for at in range(1000):
            stage.turns.tick(at * step_s, [seq], False, False)
        assert stage.turns.slack_s(seq, 5.0) == pytest.approx(2.0 + gained_s, abs=0.01)


def test_time_without_steps_is_no_pace() -> None:
    stage, seq = Stage(), sequence(20, max_tokens=100)
    for at in range(100):
        stage.turns.tick(at * 60.0, [], False, False)
    assert stage.turns.slack_s(seq, 5.0) == pytest.approx(2.0 + 40 * TPOT_S)


@pytest.mark.parametrize(
    ("outputs", "max_tokens", "left"),
    [
        (20, 100, 30),  # the others had 50
        (20, 40, 20),  # it may not have more
        (60, 100, 20),  # it is longer than the others were: half of what it may have
        (100, 100, 0),
    ],
)
def test_slack_counts_on_answers_as_long_as_others_were(outputs: int, max_tokens: int, left: int) -> None:
    stage, seq = Stage(), sequence(outputs, max_tokens)
    stage.finished(*[40, 60] * 4)
    runway_s = stage.turns.runway_s(seq, 5.0)
    assert stage.turns.slack_s(seq, 5.0) - runway_s == pytest.approx(left * TPOT_S)


def test_old_answers_are_forgotten() -> None:
    stage, seq = Stage(), sequence(20, 1000)
    stage.finished(*[500] * 100, *[50] * 64)
    assert stage.turns.slack_s(seq, 5.0) == pytest.approx(2.0 + 30 * TPOT_S)


def test_a_step_may_take_long_while_nobody_has_little_slack() -> None:
    turns = Stage().turns
    assert turns.bearable_s([], 0.0) == math.inf
    assert turns.bearable_s([sequence(50, 60)], 5.0) == math.inf
    assert turns.bearable_s([sequence(50, 60), sequence(2, 4)], 5.0) == TPOT_S


# For prompts


def test_those_furthest_ahead_leave_for_a_prompt_until_it_has_room() -> None:
    stage = Stage()
    for name, outputs in (("a", 12), ("b", 30), ("c", 20), ("d", 5)):
        stage.runs(name, outputs=outputs)
    assert stage.victims(lacking=1) == {"b": 1}
    assert stage.victims(lacking=2 * GROUPS) == {"b": 2 * GROUPS}
    assert stage.victims(lacking=2 * GROUPS + 3) == {"b": 2 * GROUPS + 3, "c": 3}
    assert list(stage.victims(lacking=1000)) == ["b", "c", "a", "d"]


def test_nobody_leaves_for_a_prompt_at_the_cost_of_its_own_promise() -> None:
    """One that has slack left goes, even if its client waits just now: it can make that up."""
    stage = Stage()
    stage.runs("behind", outputs=2, max_tokens=100)
    stage.runs("late", outputs=20, max_tokens=20)
    assert stage.turns.runway_s(stage.active[0], 3.0) < 0
    assert stage.victims(lacking=1000, now_s=3.0) == {"behind": 1000}
    assert stage.victims(lacking=1000, now_s=0.1) == {"late": 1000, "behind": 1000 - 2 * GROUPS}


def test_what_is_leaving_already_counts() -> None:
    stage = Stage()
    stage.park(stage.runs("a", outputs=30), settles=False)
    stage.runs("b", outputs=20)
    assert stage.victims(lacking=2 * GROUPS) == {}
    assert stage.victims(lacking=2 * GROUPS + 1) == {"b": 1}


def test_no_more_leave_than_the_balloon_may_hold() -> None:
    stage = Stage(host=5 * GROUPS)
    for name, outputs in (("a", 12), ("b", 30), ("c", 20)):
        stage.runs(name, outputs=outputs)
    assert list(stage.victims(lacking=1000)) == ["b", "c"]
    stage.park(stage.active[1])
    assert list(stage.victims(lacking=1000)) == ["c"]


@pytest.mark.parametrize("lacking", [0, 1000])
def test_where_nobody_takes_turns_nobody_is_asked_to_leave(lacking: int) -> None:
    stage = Stage(policy="fcfs")
    stage.park(stage.runs("parked", outputs=2))
    stage.runs("a", outputs=60)
    assert stage.victims(lacking) == {}
    bench = Bench()
    assert bench.scheduler.turns.victims(0.0, [], [sequence(50)], lacking) == []
    assert not bench.scheduler.turns.park(sequence(50), 1, "park_for_prompt")


# For the next


def crowded(outputs: int, *others: int) -> Stage:
    """One is parked with 10 outputs, and has no room to come back beside those that run."""
    stage = Stage(total=30)
    stage.park(stage.runs("parked", outputs=10))
    for index, count in enumerate((outputs, *others)):
        stage.runs(f"r{index}", num_rows=3, outputs=count)
    return stage


def test_who_is_a_whole_turn_ahead_leaves_for_the_next() -> None:
    assert crowded(10 + TURN - 1, 12).victims() == {}
    stage = crowded(10 + TURN, 12)
    parking = stage.yard.parking
    lacking = parking.num_lacking(stage.turns.parked[0].backing, GROUPS)
    assert lacking > 0
    assert stage.victims() == {"r0": lacking}


def test_one_leaves_for_the_next_at_a_time() -> None:
    stage = crowded(10 + TURN, 10 + 2 * TURN)
    assert list(stage.victims()) == ["r1"]
    stage.park(stage.active[1], settles=False)
    assert stage.victims() == {}, "it is leaving"
    stage.yard.settle()
    assert stage.brings_back() == "parked"
    assert stage.victims() == {}, "another is coming"


def test_memory_for_a_return_is_mapped_beside_the_step_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not beside the last, which may have been the end of a long prompt where another begins now."""
    stage = Stage()
    running, parked = stage.runs("running"), stage.runs("parked")
    stage.park(parked)
    asked: list[float] = []

    def bring_back(backing: object, num_reserved: int, is_alone: bool, step_s: float) -> bool:
        asked.append(step_s)
        return False

    monkeypatch.setattr(stage.yard.parking, "bring_back", bring_back)
    for now_s in (0.0, 0.5):
        stage.turns.tick(now_s, [running], True, False)
    for predicted_s in (0.1, 2.0):
        stage.turns.launched(predicted_s)
        stage.brings_back()
    assert asked == [0.1, 0.5]
    stage.turns.bring_back_any(0.5)
    assert asked[-1] == math.inf, "nothing is in flight"


def test_nobody_leaves_for_one_that_has_room() -> None:
    stage = Stage()
    stage.park(stage.runs("parked", outputs=10))
    stage.runs("a", outputs=10 + 5 * TURN)
    assert stage.victims() == {}
    assert stage.brings_back() == "parked"


def test_nobody_leaves_where_nobody_is_parked() -> None:
    stage = Stage()
    stage.runs("a", outputs=60)
    assert stage.victims() == {}


# Coming back


def test_who_is_furthest_behind_comes_back_first_and_alone() -> None:
    stage = Stage()
    for name, outputs in (("a", 12), ("b", 5), ("c", 20)):
        stage.runs(name, outputs=outputs)
    for seq in list(stage.active):
        stage.park(seq)
    order: list[str] = []
    for _ in range(3):
        who = stage.brings_back()
        assert who is not None
        assert stage.brings_back() is None, "one after the other"
        order.append(who)
        stage.yard.copies.end()
        (seq,) = stage.turns.settle()
        assert seq.request_id == who
        seq.slot = stage.turns.take_back(seq)
        seq.move(State.RUNNING)
        stage.active.append(seq)
    assert order == ["b", "a", "c"]
    assert stage.turns.parked == []


def test_one_that_is_leaving_is_not_next() -> None:
    stage = Stage()
    stage.park(stage.runs("a", outputs=12))
    stage.park(stage.runs("b", outputs=5), settles=False)
    assert stage.brings_back() == "a"


def test_a_prompt_goes_before_one_that_comes_back_unless_its_promise_is_at_stake() -> None:
    stage = Stage()
    stage.park(stage.runs("a", outputs=10, max_tokens=20))
    slack_s = stage.turns.slack_s(stage.turns.parked[0], 0.0)
    assert stage.brings_back(lacking=1, now_s=slack_s - 0.01) is None
    assert stage.brings_back(lacking=1, now_s=slack_s + 0.01) == "a"


def test_where_nobody_takes_turns_prompts_do_not_go_first() -> None:
    stage = Stage(policy="fcfs")
    stage.park(stage.runs("a", outputs=10))
    assert stage.brings_back(lacking=1) == "a"


def test_room_to_grow_is_left_to_those_that_run() -> None:
    """A row of each layer group, or a hundredth of a large pool."""
    stage = Stage(total=40)
    stage.park(stage.runs("a", num_rows=3))
    stage.runs("b", num_rows=1)
    parking, visitor = stage.yard.parking, stage.yard.guest(T)
    while parking.num_lacking(stage.turns.parked[0].backing, GROUPS) <= 0:
        assert stage.yard.compute(visitor, visitor.num_computed + T)
    assert parking.num_lacking(stage.turns.parked[0].backing, 0) <= 0, "there is room for itself"
    assert stage.brings_back() is None
    stage.active.clear()
    assert stage.brings_back() == "a"


def test_a_prompt_that_has_begun_gets_its_memory_first() -> None:
    stage = Stage(total=40)
    stage.park(stage.runs("a", num_rows=3))
    begun = stage.runs("b", num_rows=1)
    begun.state, begun.output_token_ids = State.PREFILLING, []
    begun.request = GenerateRequest("b", tokens("b", 6 * T), SamplingParams(max_tokens=5))
    room = -stage.yard.parking.num_lacking(stage.turns.parked[0].backing, 0)
    assert room >= GROUPS
    assert room < 5 * GROUPS + GROUPS
    assert stage.brings_back() is None
    stage.active.remove(begun)
    assert stage.brings_back() == "a"


def test_with_nothing_else_to_do_whoever_fits_comes_back() -> None:
    stage = Stage(total=40)
    stage.park(stage.runs("large", num_rows=5, outputs=5))
    stage.park(stage.runs("small", num_rows=2, outputs=20))
    stage.yard.guest(5 * T)
    assert stage.brings_back() is None
    assert stage.turns.bring_back_any(0.0)
    assert stage.coming == "small"
    assert not stage.turns.bring_back_any(0.0), "one after the other"


# A balloon that is nearly full


def full(*counts: tuple[str, int, int]) -> Stage:
    """Sequences of (name, outputs, expected yet to come), beside two parked ones that fill the balloon."""
    stage = Stage(total=52, host=8 * GROUPS)
    for name in ("x", "y"):
        stage.park(stage.runs(name, num_rows=4, outputs=30, first_s=100.0, max_tokens=200))
    for name, outputs, left in counts:
        stage.runs(name, outputs=outputs, first_s=100.0, max_tokens=outputs + 2 * left)
    return stage


def test_with_the_balloon_nearly_full_those_that_end_soonest_stay() -> None:
    stage = full(("ahead but ending", 30, 2), ("middle", 12, 20), ("behind and long", 5, 60))
    assert stage.turns.furthest_ahead(stage.active, 0.0).request_id == "behind and long"
    stage = Stage()
    for name, outputs, left in (("ahead but ending", 30, 2), ("behind and long", 5, 60)):
        stage.runs(name, outputs=outputs, first_s=100.0, max_tokens=outputs + 2 * left)
    assert stage.turns.furthest_ahead(stage.active, 0.0).request_id == "ahead but ending", "else by runway"


def test_whose_promise_is_at_stake_stays_even_then() -> None:
    stage = full(("ending", 30, 2), ("at stake", 5, 60))
    stage.active[1].first_token_s = -5.0
    assert stage.turns.slack_s(stage.active[1], 0.0) < 2.0
    assert stage.turns.furthest_ahead(stage.active, 0.0).request_id == "ending"


def test_nobody_leaves_for_the_next_when_the_balloon_is_nearly_full() -> None:
    """Then some should end rather than all go on."""
    stage = full(("a", 60, 2))
    stage.yard.guest(7 * T)
    turns, (first, second) = stage.turns, stage.turns.parked
    first.first_token_s = second.first_token_s = 0.0
    assert turns.runway_s(stage.active[0], 0.0) - turns.runway_s(first, 0.0) > TURN_S
    assert stage.yard.parking.num_lacking(first.backing, 0) > 0
    assert stage.victims() == {}
    assert stage.victims(lacking=1) == {}, "nor is there room for more"


def test_who_ends_soonest_comes_back_first_when_the_balloon_is_nearly_full() -> None:
    stage = Stage(total=150, host=8 * GROUPS)
    stage.park(stage.runs("behind", num_rows=4, outputs=5, first_s=100.0, max_tokens=200))
    stage.park(stage.runs("ending", num_rows=4, outputs=30, first_s=100.0, max_tokens=32))
    assert stage.brings_back() == "ending"


# What became of copies


def test_a_sequence_that_could_not_leave_is_named_at_once() -> None:
    stage = Stage()
    seq = stage.runs("a")
    slot = seq.slot
    stage.yard.copies.fails = lambda ticket: True
    stage.park(seq, settles=False)
    assert stage.turns.settle() == []
    stage.yard.copies.end()
    assert stage.turns.settle() == [seq]
    assert stage.turns.parked == []
    assert stage.turns.take_back(seq) == slot


def test_waiting_is_for_whoever_comes_back_then_for_whoever_leaves() -> None:
    stage = Stage()
    assert not stage.turns.wait()
    assert not stage.turns.is_moving
    back, leaving = stage.runs("back"), stage.runs("leaving")
    stage.park(back)
    stage.park(leaving, settles=False)
    assert stage.brings_back() == "back"
    assert stage.turns.is_moving
    assert stage.turns.wait()
    assert [ticket.direction for ticket in stage.yard.copies.under_way] == [OUT]
    assert stage.turns.settle() == [back]
    assert stage.turns.wait()
    assert stage.yard.copies.under_way == []
    assert not stage.turns.is_moving


def test_a_parked_sequence_that_ends_is_forgotten() -> None:
    stage = Stage()
    seq = stage.runs("a")
    stage.park(seq)
    assert stage.brings_back() == "a"
    slot, num_tokens = stage.turns.discard(seq, 0)
    assert (slot is not None, num_tokens) == (True, 0)
    assert stage.turns.parked == []
    assert not stage.turns.is_moving
    assert stage.turns.settle() == []


# Ahead of need


def test_who_will_leave_next_is_saved_first() -> None:
    stage = Stage(total=40)
    ahead, behind = stage.runs("ahead", 3, outputs=40), stage.runs("behind", 5, outputs=5)
    stage.turns.write_through(stage.active, 0.0)
    first = stage.yard.copies.submitted[0]
    kv = stage.yard.pool.kv
    assert first.sources[0] == kv.tensors[0].address_of(kv.first_row(ahead.held_slot))
    num_tickets = len(stage.yard.copies.submitted)
    stage.turns.write_through(stage.active, 0.0)
    assert len(stage.yard.copies.submitted) == num_tickets, "the link has something to do"
    stage.yard.settle()
    assert len(ahead.backing.rows) == 3
    for _ in range(10):
        stage.turns.write_through(stage.active, 0.0)
        stage.yard.settle()
    assert (len(ahead.backing.rows), len(behind.backing.rows)) == (3, 5)


@pytest.mark.parametrize(("total", "policy"), [(120, "slo"), (40, "fcfs")])
def test_where_nobody_will_be_parked_nothing_is_saved(total: int, policy: str) -> None:
    stage = Stage(total, policy=policy)
    stage.runs("a", 3, outputs=40)
    stage.runs("b", 5, outputs=5)
    stage.turns.write_through(stage.active, 0.0)
    assert stage.yard.copies.submitted == []
