"""Engines that park sequences, with copies that take their time: whatever happens, every answer is right.

The pattern model reads every key and value back before each step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest

from engine.config import MemoryConfig, SchedulerConfig
from engine.messages import GenerateRequest, SamplingParams
from engine.sequence import Sequence, State
from tests.fakes import Bench, HeldCopies, answer
from tests.unit.engine_cases import ask, expect, finish, tokens
from tests.unit.parking_cases import IN, OUT, STAGES, filled, num_parkings, watch

pytestmark = pytest.mark.usefixtures("steps_ahead")

# 16 chunks each in the end. At the pace of the fake clock each is soon a turn ahead of its client.
REQUESTS = [replace(ask(f"r{at}", 20 + 7 * at, 90), tpot_slo_s=0.01) for at in range(4)]


def crowded(total: int = 46, balloon_chunks: int = 400) -> tuple[Bench, HeldCopies]:
    """An engine with too little memory for its requests, and a link that is slow at will."""
    copies = HeldCopies()
    limits = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64, turn_tokens=4, min_retained_chunks=0)
    memory = MemoryConfig(map_ahead_tokens=0)  # the mapping thread's pace would be another at each run
    bench = Bench(total, memory, limits, balloon_chunks=balloon_chunks, copies=copies)
    filled(bench.balloon)
    watch(bench.pool, copies)
    return bench, copies


def step(bench: Bench, copies: HeldCopies) -> bool:
    """One step, after which what is being copied is still there."""
    is_busy = bench.engine.step()
    for ticket in copies.under_way:
        copies.check(ticket)
    bench.pool.check()
    return is_busy


def stage_of(seq: Sequence) -> str | None:
    backing = seq.backing
    if seq.state is not State.PARKED:
        return None
    if backing.is_leaving:
        return "leaving"
    if backing.coming is not None:
        return "coming"
    return "parked" if backing.slot is not None else "slotless"


def until_one_is(stage: str, bench: Bench, copies: HeldCopies) -> Sequence:
    """Step until a sequence is in that stage."""
    for _ in range(2000):
        for seq in bench.scheduler.unfinished():
            if stage_of(seq) == stage:
                return seq
        if stage != "leaving":
            for ticket in copies.under_way:
                if ticket.direction is OUT:
                    copies.end(ticket)
        step(bench, copies)
    raise AssertionError(f"nobody was ever {stage}")


def test_sequences_take_turns_and_lose_nothing() -> None:
    bench, copies = crowded()
    for request in REQUESTS:
        bench.engine.submit(request)
    num_beside = 0
    while step(bench, copies):
        is_leaving = any(stage_of(seq) == "leaving" for seq in bench.scheduler.unfinished())
        num_beside += is_leaving and bool(bench.runner.plans)
        bench.runner.plans.clear()
    finish(bench, REQUESTS)
    assert num_parkings(bench) > 1
    assert bench.scheduler.num_preemptions == 0, "there was room in the balloon for all"
    assert num_beside > 0, "others go on beside the copies"
    assert bench.num_held == 0
    assert copies.bytes_moved(IN) > 0


@pytest.mark.parametrize("direction", [OUT, IN])
def test_an_engine_with_nothing_to_compute_waits_for_a_copy(direction: object) -> None:
    """And for no more than one: whoever is there first goes on."""
    bench, copies = crowded()
    request = ask("long", 60, 90)
    bench.engine.submit(request)
    for _ in range(4):
        step(bench, copies)
    seq = bench.scheduler.get("long")
    assert seq is not None
    until_in_flight_is_read(bench, seq)
    assert bench.scheduler._try_park(seq, 1000, "park_for_turn")
    if direction is IN:
        copies.end()
    for _ in range(10):
        step(bench, copies)
    assert seq.state is State.RUNNING
    assert {ticket.direction for ticket in copies.submitted} == {OUT, IN}
    finish(bench, [request])


def until_in_flight_is_read(bench: Bench, seq: Sequence) -> None:
    bench.engine._complete_all(but=0)
    assert seq.num_in_flight == 0


@pytest.mark.parametrize("steps_ahead", [1], indirect=True)  # else every token is read before one is parked
def test_a_sequence_that_stops_while_it_leaves_waits_for_its_copy() -> None:
    """The token that ends it was in flight when it was parked."""
    bench, copies = crowded()
    for request in REQUESTS:
        bench.engine.submit(request)
    leaving = until_one_is("leaving", bench, copies)
    name, at = leaving.request_id, len(leaving.output_token_ids) - 1
    num_tickets, last = len(copies.submitted), leaving.output_token_ids[-1]
    assert last not in leaving.output_token_ids[:-1]
    # The same again, until that token ends it.
    sampling = replace(leaving.sampling, stop_token_ids=(last,))
    requests = {one.request_id: one for one in REQUESTS}
    requests[name] = replace(requests[name], sampling=sampling)
    bench, copies = crowded()
    for request in requests.values():
        bench.engine.submit(request)
    while name not in bench.deltas or not bench.deltas[name].finish_reason:
        assert len(copies.submitted) < num_tickets
        step(bench, copies)
    assert len(copies.submitted) == num_tickets, "it was parked and ended in one step"
    assert copies.submitted[-1].direction is OUT
    assert copies.submitted[-1].is_done
    assert len(bench.deltas[name].token_ids) == at + 1
    assert bench.deltas[name].finish_reason == "stop"
    bench.run()
    for request in requests.values():
        if request.request_id != name:
            expect(bench, request)
    bench.assert_idle()
    assert bench.num_held == 0


@pytest.mark.parametrize("stage", STAGES)
def test_a_request_can_be_cancelled_at_any_stage(stage: str) -> None:
    bench, copies = crowded()
    for request in REQUESTS:
        bench.engine.submit(request)
    gone = until_one_is(stage, bench, copies)
    bench.engine.cancel(gone.request_id)
    step(bench, copies)
    assert bench.deltas[gone.request_id].finish_reason == "cancelled"
    assert gone.backing.rows == []
    bench.run()
    for request in REQUESTS:
        if request.request_id != gone.request_id:
            expect(bench, request)
    bench.assert_idle()
    assert bench.num_held == 0


@pytest.mark.parametrize("stage", STAGES)
def test_an_engine_can_be_shut_down_at_any_stage(stage: str) -> None:
    bench, copies = crowded()
    for request in REQUESTS:
        bench.engine.submit(request)
    until_one_is(stage, bench, copies)
    stop = threading.Event()
    stop.set()
    bench.engine.run_until(stop)
    assert {bench.deltas[request.request_id].finish_reason for request in REQUESTS} == {"error"}
    for request in REQUESTS:
        said = bench.deltas[request.request_id].token_ids
        assert said == answer(request.prompt_token_ids, 90)[: len(said)]
    bench.pool.check()


def test_a_shared_beginning_survives_those_who_wrote_it() -> None:
    """Who computed it is parked, comes back elsewhere in time, and ends, while others read it."""
    stem = tokens("stem", 96)
    requests = [
        GenerateRequest(f"s{at}", (*stem, *tokens(f"s{at}", 5 + at)), SamplingParams(max_tokens=40 + 20 * at))
        for at in range(4)
    ]
    bench, copies = crowded(total=50)
    bench.engine.submit(requests[0])
    step(bench, copies)
    for request in requests[1:]:
        bench.engine.submit(request)
    kept = 0
    while step(bench, copies):
        for seq in bench.scheduler.turns.parked:
            kept += seq.backing.first > 0
    finish(bench, requests)
    assert num_parkings(bench) > 0
    assert kept > 0, "a shared beginning stayed while its sequence was parked"


@pytest.mark.parametrize("which", ["oldest", "newest"])
def test_copies_that_end_in_any_order_of_the_two_directions(which: str) -> None:
    bench, copies = crowded()
    for request in REQUESTS:
        bench.engine.submit(request)
    pick: Callable[[HeldCopies], object] = lambda one: one.under_way[0 if which == "oldest" else -1]  # noqa: E731
    while step(bench, copies):
        if copies.under_way:
            copies.end(pick(copies))  # type: ignore[arg-type]
    finish(bench, REQUESTS)
    assert num_parkings(bench) > 4
