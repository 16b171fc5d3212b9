"""The order of the requests that wait to start: the one that is due first, and nobody waits for ever."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import MemoryConfig, SchedulerConfig
from engine.memory.blocks import TokenChain
from engine.messages import GenerateRequest, SamplingParams
from engine.sequence import Sequence
from engine.waiting import WaitingLine
from tests.fakes import Bench
from tests.unit.engine_cases import ask, finish, tokens

LATE_TURN = 4  # every fourth start is of one that is late
PRIORITY_S = 10.0


def waits(
    name: str, arrival_s: float = 0.0, ttft_s: float = 2.0, priority: int = 0, num_tokens: int = 10
) -> Sequence:
    prompt = tokens(name, num_tokens)
    request = GenerateRequest(name, prompt, SamplingParams(max_tokens=5), priority=priority)
    return Sequence(request, 0, arrival_s, TokenChain("", 32), ttft_slo_s=ttft_s)


def line_of(*sequences: Sequence, by_deadline: bool = True) -> WaitingLine:
    line = WaitingLine(Bench().pool, by_deadline)
    for seq in sequences:
        line.add(seq)
    return line


def names(line: WaitingLine) -> list[str]:
    """Everybody, the next first."""
    return [seq.request_id for seq in line.first(len(line))] if len(line) else []


def start_all(line: WaitingLine) -> list[str]:
    order = []
    while len(line):
        order.append(line.head.request_id)
        line.started(line.head)
    return order


def test_whose_first_token_is_due_first_is_next() -> None:
    line = line_of(waits("a", 0.0, 9.0), waits("b", 1.0, 2.0), waits("c", 2.0, 0.5), waits("d", 0.5, 4.0))
    assert names(line) == ["c", "b", "d", "a"]
    assert start_all(line) == ["c", "b", "d", "a"]


def test_with_the_same_promise_first_come_is_first_served() -> None:
    line = line_of(*(waits(f"r{at}", arrival_s=at / 100) for at in (3, 0, 2, 1)))
    assert names(line) == ["r0", "r1", "r2", "r3"]


def test_who_was_preempted_waits_where_its_arrival_puts_it() -> None:
    line = line_of(waits("b", 1.0), waits("c", 2.0))
    line.add(waits("a", 0.0))
    assert line.head.request_id == "a"


def test_without_deadlines_arrival_alone_counts() -> None:
    line = line_of(waits("a", 0.0, 9.0), waits("b", 1.0, 0.1), by_deadline=False)
    line.pass_time(100.0, 1.0)
    assert names(line) == ["a", "b"]
    assert not line.is_late


@pytest.mark.parametrize("by_deadline", [True, False])
def test_a_step_of_priority_is_worth_so_much_waiting(by_deadline: bool) -> None:
    urgent = waits("urgent", arrival_s=9.9, priority=-1)
    line = line_of(waits("a", 0.0), urgent, waits("later", 0.1), by_deadline=by_deadline)
    assert names(line) == ["urgent", "a", "later"]
    line.remove(urgent)
    line.add(waits("too late", arrival_s=PRIORITY_S + 0.05, priority=-1))
    assert names(line) == ["a", "too late", "later"], "whoever has waited longer than that is next"


def test_nobody_starves_behind_higher_priorities() -> None:
    line, now, started = line_of(waits("patient", priority=2)), 0.0, []
    while "patient" not in started:
        now += 1.0
        line.add(waits(f"r{now}", arrival_s=now, priority=0))
        started.append(line.head.request_id)
        line.started(line.head)
        assert now <= 2 * PRIORITY_S + 1
    assert now >= 2 * PRIORITY_S


def test_who_cannot_be_in_time_any_more_goes_behind() -> None:
    line = line_of(waits("a", 0.0, 1.0), waits("b", 0.0, 2.0), waits("c", 0.0, 3.0))
    line.pass_time(1.5, 0.0)
    assert names(line) == ["b", "c", "a"]
    assert line.is_late
    line.pass_time(2.5, 0.0)
    assert names(line) == ["c", "a", "b"]
    assert len(line) == 3


def test_what_a_prompt_takes_to_compute_counts() -> None:
    """With 0.01 s a token, 150 tokens cannot be there within a second."""
    line = line_of(waits("long", 0.0, 1.0, num_tokens=150), waits("short", 0.0, 1.1, num_tokens=20))
    line.pass_time(0.0, 0.0)
    assert not line.is_late
    line.pass_time(0.0, 0.01)
    assert names(line) == ["short", "long"]


def test_every_fourth_start_is_of_one_that_is_late() -> None:
    line = line_of(*(waits(f"late{at}", at / 10, 1.0) for at in range(3)))
    line.pass_time(10.0, 0.0)
    for at in range(8):
        line.add(waits(f"r{at}", 20.0 + at))
    order = start_all(line)
    assert order[:8] == ["r0", "r1", "r2", "late0", "r3", "r4", "r5", "late1"]
    assert order[8:] == ["r6", "r7", "late2"], "the rest goes when nobody else is there"


def test_what_is_cancelled_is_no_start() -> None:
    late, others = waits("late", 0.0, 1.0), [waits(f"r{at}", 20.0 + at) for at in range(5)]
    line = line_of(late)
    line.pass_time(10.0, 0.0)
    for one in others:
        line.add(one)
    for one in others[:3]:
        line.remove(one)
    assert line.head is others[3]
    line.remove(late)
    assert not line.is_late
    assert start_all(line) == ["r3", "r4"]


def test_those_who_are_late_keep_their_order() -> None:
    line = line_of(waits("b", 0.0, 2.0), waits("c", 0.0, 3.0))
    line.pass_time(10.0, 0.0)
    line.add(waits("a", 0.0, 1.0))
    line.pass_time(10.0, 0.0)
    assert start_all(line) == ["a", "b", "c"]


def test_what_the_line_lacks_is_counted() -> None:
    bench = Bench()
    bench.engine.submit(ask("known", 100, 4))
    bench.run()
    known = (*tokens("known", 100), *bench.deltas["known"].token_ids)
    line = WaitingLine(bench.pool, by_deadline=True)
    fresh = waits("fresh", num_tokens=40)
    request = GenerateRequest("again", (*known, 3, 4), SamplingParams(max_tokens=5))
    again = Sequence(request, 0, 0.0, TokenChain("", 32), ttft_slo_s=1.0)
    line.add(fresh)
    assert line.num_lacking_tokens == 40
    line.add(again)
    assert (again.num_lacking, line.num_lacking_tokens) == (3, 43), "103 of its tokens are there"
    assert bench.pool.chunks_wanted(but_by="somebody else") > 0
    assert bench.pool.chunks_wanted(but_by="again") == 0
    line.started(fresh)
    assert line.num_lacking_tokens == 3
    line.remove(again)
    assert line.num_lacking_tokens == 0
    assert bench.pool.chunks_wanted(but_by="somebody else") == 0


def test_an_empty_line_has_no_head() -> None:
    line = line_of()
    with pytest.raises(IndexError):
        _ = line.head
    assert len(line) == 0


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.sampled_from([0, 0, 1])), max_size=30),
    st.integers(1, 6),
)
def test_starts_are_in_order_and_nobody_is_left_out(
    arrivals: list[tuple[int, int, int]], served: int
) -> None:
    line, now, num_passed_by = line_of(), 0.0, 0
    due: dict[str, float] = {}
    for index, (gap, ttft, priority) in enumerate(arrivals):
        now += gap
        name = f"r{index:02}"
        line.add(waits(name, arrival_s=now, ttft_s=float(ttft), priority=priority))
        due[name] = now + ttft + priority * PRIORITY_S
        line.pass_time(now, 0.0)
        late = sorted((due_s, name) for name, due_s in due.items() if due_s < now)
        in_time = sorted((due_s, name) for name, due_s in due.items() if due_s >= now)
        assert line.is_late == bool(late)
        assert sorted(names(line)) == sorted(due)
        assert line.head.request_id in {name for _, name in (*late[:1], *in_time[:1])}
        if index % served == 0:
            head = line.head
            num_passed_by = 0 if not late or head.request_id == late[0][1] else num_passed_by + 1
            assert num_passed_by < LATE_TURN
            line.started(head)
            del due[head.request_id]
    assert sorted(start_all(line)) == sorted(due)


def test_an_engine_starts_who_is_due_first() -> None:
    """All come while another request holds the only seat."""
    limits = SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=64)
    bench = Bench(60, MemoryConfig(enable_prefix_caching=False), limits)
    running = ask("running", 20, 20)
    bench.engine.submit(running)
    bench.engine.step()
    promises = {"slow": (9.0, 0), "quick": (3.0, 0), "quickest": (1.0, 0), "unimportant": (1.0, 1)}
    requests = [
        replace(ask(name, 20, 3), ttft_slo_s=ttft_s, priority=priority)
        for name, (ttft_s, priority) in promises.items()
    ]
    for request in requests:
        bench.engine.submit(request)
    finish(bench, [running, *requests])
    assert list(bench.deltas) == ["running", "quickest", "quick", "slow", "unimportant"]
