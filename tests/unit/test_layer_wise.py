"""Prompts that are computed into the balloon: what they say is right, whatever becomes of their copies.

The pattern model writes and reads back a layer at a time, so that a chunk which two layer groups share has
to be copied before the second is written.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.config import MemoryConfig, SchedulerConfig
from engine.memory.backing import Backing
from engine.memory.layer_wise import Offload
from engine.messages import SamplingParams
from engine.sequence import State
from tests.failing_memory import FailingVirtualMemory
from tests.fakes import CHUNK_BYTES, Bench, HeldCopies, HeldTicket
from tests.unit.engine_cases import ask, expect, finish, serve
from tests.unit.parking_cases import GROUPS, OUT, T, Yard, filled, watch

pytestmark = pytest.mark.usefixtures("steps_ahead")

REQUESTS = [ask(f"r{at}", 36, 40) for at in range(8)]
LIMITS = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64, policy="fcfs")
MEMORY = MemoryConfig(map_ahead_tokens=0)  # the mapping thread's pace would be another at each run


def crowded(
    limits: SchedulerConfig = LIMITS,
    vm: FailingVirtualMemory | None = None,
    balloon_chunks: int = 400,
    copies: HeldCopies | None = None,
) -> tuple[Bench, HeldCopies]:
    """An engine with room for two of the requests, where nobody leaves for a prompt."""
    copies = copies or HeldCopies()
    bench = Bench(40, MEMORY, limits, vm=vm, balloon_chunks=balloon_chunks, copies=copies)
    filled(bench.balloon)
    watch(bench.pool, copies)
    return bench, copies


def num_staged(bench: Bench) -> int:
    return bench.scheduler.turns.decisions["layer_wise"]


def until_staged(bench: Bench) -> str:
    """Submit and step until a prompt was computed layer-wise; its name."""
    for request in REQUESTS:
        bench.engine.submit(request)
    for _ in range(200):
        bench.engine.step()
        parked = bench.scheduler.turns.parked
        if parked:
            return parked[0].request_id
    raise AssertionError("no prompt was computed layer-wise")


# A staging slot by itself


class Order(HeldCopies):
    """Writes down what waits for what."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, int]] = []

    def submit(self, *arguments: object, **more: object) -> HeldTicket:  # type: ignore[override]
        ticket = super().submit(*arguments, **more)  # type: ignore[arg-type]
        self.log.append(("copy", len(self.submitted) - 1))
        return ticket

    def hold_steps(self, ticket: object) -> None:
        assert isinstance(ticket, HeldTicket)
        self.log.append(("wait", self.submitted.index(ticket)))
        super().hold_steps(ticket)


def staged(yard: Yard, num_tokens: int) -> Offload:
    layer_wise = yard.pool.layer_wise
    assert layer_wise is not None
    offload = layer_wise.begin(Backing(), num_tokens)
    assert offload is not None
    assert layer_wise.grow(num_tokens)
    return offload


def compute(yard: Yard, offload: Offload) -> None:
    for layer in range(yard.geometry.num_layers):
        offload.before(layer)
        offload.after(layer)


def test_a_group_is_computed_when_the_copy_of_the_one_before_the_last_has_ended() -> None:
    yard = Yard()
    yard.copies.__class__ = Order
    yard.copies.log = []  # type: ignore[attr-defined]
    layer_wise = yard.pool.layer_wise
    assert layer_wise is not None
    for _ in range(2):
        offload = staged(yard, 3 * T)
        compute(yard, offload)
        assert not offload.is_done
        layer_wise.cancel(offload)
    per_prompt = [
        entry
        for group in range(2 * GROUPS)
        for entry in ((("wait", group - 2),) if group >= 2 else ()) + (("copy", group),)
    ]
    assert yard.copies.log == per_prompt  # type: ignore[attr-defined]


def test_two_groups_of_chunks_serve_all() -> None:
    yard = Yard()
    free = yard.pool.chunks.num_free
    offload = staged(yard, 3 * T)
    layer_wise, kv = yard.pool.layer_wise, yard.pool.kv
    assert layer_wise is not None
    assert free - yard.pool.chunks.num_free == 2 * 3
    first = kv.first_row(offload.slot)
    behind = [[tensor.chunk_at(first + row) for row in range(3)] for tensor in kv.tensors]
    assert behind == [behind[group % 2] for group in range(GROUPS)]
    assert set(behind[0]).isdisjoint(behind[1])
    compute(yard, offload)
    assert len(yard.copies.submitted) == GROUPS
    assert all(len(ticket.targets) == 3 and ticket.direction is OUT for ticket in yard.copies.submitted)
    targets = {target for ticket in yard.copies.submitted for target in ticket.targets}
    assert len(targets) == 3 * GROUPS
    layer_wise.release()
    assert yard.pool.chunks.num_free < free, "they are being copied"
    layer_wise.cancel(offload)
    layer_wise.release()
    assert (yard.pool.chunks.num_free, yard.num_held) == (free, 0)
    yard.pool.check()


def test_a_longer_prompt_gets_what_it_lacks_and_a_shorter_one_nothing() -> None:
    yard = Yard()
    layer_wise = yard.pool.layer_wise
    assert layer_wise is not None
    for num_tokens, num_missing in ((2 * T, 4), (T, 0), (4 * T, 4), (4 * T, 0)):
        assert layer_wise.num_missing(num_tokens) == num_missing
        layer_wise.cancel(staged(yard, num_tokens))
    yard.pool.check()


def test_without_room_in_the_balloon_nothing_is_begun() -> None:
    yard = Yard(host=2 * GROUPS - 1)
    assert yard.pool.layer_wise is not None
    assert yard.pool.layer_wise.begin(Backing(), 2 * T) is None
    assert yard.num_held == 0


@pytest.mark.parametrize("after", range(GROUPS))
def test_a_slot_that_cannot_be_mapped_is_left_and_another_is_taken(after: int) -> None:
    vm = FailingVirtualMemory(CHUNK_BYTES, 120)
    yard = Yard(vm=vm)
    layer_wise, free = yard.pool.layer_wise, yard.pool.chunks.num_free
    assert layer_wise is not None
    refused = layer_wise.begin(Backing(), T)
    assert refused is not None
    vm.refuse("map", after)
    assert not layer_wise.grow(T)
    layer_wise.cancel(refused)
    yard.pool.check()
    assert yard.pool.chunks.num_free == free
    again = staged(yard, T)
    compute(yard, again)
    layer_wise.cancel(again)


# In an engine


def test_first_tokens_come_before_there_is_room_and_answers_are_right() -> None:
    bench, copies = crowded()
    without, _ = crowded(replace(LIMITS, layer_wise=False))
    first = {}
    for one in (bench, without):
        for request in REQUESTS:
            one.engine.submit(request)
        for _ in range(30):
            one.engine.step()
        first[one] = sum(
            bool(one.deltas[r.request_id].token_ids) for r in REQUESTS if r.request_id in one.deltas
        )
        finish(one, REQUESTS)
    assert first[bench] == len(REQUESTS) > first[without]
    assert num_staged(bench) >= 4
    assert num_staged(without) == 0
    assert bench.num_held == 0


def test_slow_copies_only_take_time() -> None:
    bench, copies = crowded()
    for request in REQUESTS:
        bench.engine.submit(request)
    for at in range(400):
        bench.engine.step()
        bench.pool.check()
        if at % 5 == 0 and copies.under_way:
            copies.end(copies.under_way[0])
    finish(bench, REQUESTS)
    assert num_staged(bench) >= 4


@pytest.mark.parametrize("group", [0, 1, GROUPS - 1])
def test_a_copy_that_fails_costs_its_prompt_time_and_nobody_else(group: int) -> None:
    bench, copies = crowded()
    copies.fails = lambda ticket: ticket.direction is OUT and copies.submitted.index(ticket) == group
    serve(bench, REQUESTS)
    assert num_staged(bench) >= 4
    assert bench.scheduler.turns.decisions["recompute"] >= 1
    assert bench.num_held == 0


@pytest.mark.parametrize("ended", [True, False], ids=["copied", "being copied"])
def test_it_can_be_cancelled(ended: bool) -> None:
    bench, copies = crowded()
    name = until_staged(bench)
    if ended:
        copies.end()
        bench.engine.step()
    bench.engine.cancel(name)
    bench.run()
    assert bench.deltas[name].finish_reason == "cancelled"
    for request in REQUESTS:
        if request.request_id != name:
            expect(bench, request)
    bench.assert_idle()
    assert bench.num_held == 0


def test_one_token_is_all_that_some_want() -> None:
    bench, _ = crowded()
    short = [replace(ask(f"s{at}", 30, 1), sampling=SamplingParams(max_tokens=1)) for at in range(4)]
    serve(bench, [*REQUESTS, *short])
    assert num_staged(bench) >= 4
    assert bench.num_held == 0


def test_who_does_not_fit_a_step_waits_for_room() -> None:
    bench, _ = crowded()
    long = [ask(f"l{at}", 70, 30) for at in range(6)]
    serve(bench, long)
    assert num_staged(bench) == 0


def test_with_the_balloon_full_they_wait() -> None:
    bench, _ = crowded(balloon_chunks=2 * GROUPS - 1)
    serve(bench, REQUESTS)
    assert num_staged(bench) == 0


def test_found_beginnings_are_read_where_they_are() -> None:
    """Computed again they would cost more than the wait."""
    bench, _ = crowded()
    bench.engine.submit(REQUESTS[0])
    bench.run()
    same = [replace(REQUESTS[0], request_id=f"again{at}") for at in range(5)]
    for request in [*REQUESTS[1:4], *same]:
        bench.engine.submit(request)
    bench.run()
    for request in same:
        expect(bench, request)


@pytest.mark.parametrize("call", ["map", "create"])
def test_a_driver_that_refuses_costs_time(call: str) -> None:
    vm = FailingVirtualMemory(CHUNK_BYTES, 40)
    bench, _ = crowded(vm=vm)
    for request in REQUESTS:
        bench.engine.submit(request)
    for at in range(300):
        if at in (5, 9, 14):
            vm.refuse(call)
        bench.engine.step()
        bench.pool.check()
    finish(bench, REQUESTS)


def test_the_staging_slot_goes_back_with_a_trim() -> None:
    bench, _ = crowded()
    serve(bench, REQUESTS)
    layer_wise = bench.pool.layer_wise
    assert layer_wise is not None
    held = bench.pool.snapshot().activation
    bench.engine.trim()
    bench.engine.step()
    assert bench.pool.snapshot().activation < held
    assert layer_wise.num_missing(T) == 2
    bench.pool.check()
    serve(bench, [replace(request, request_id=f"{request.request_id}b") for request in REQUESTS])


def test_a_running_sequence_that_may_leave_goes_first() -> None:
    """With turns, pieces of a prompt beside decodes cost less than all of it at once."""
    bench, _ = crowded(replace(LIMITS, policy="slo"))
    serve(bench, [replace(request, tpot_slo_s=0.01) for request in REQUESTS])
    assert bench.scheduler.turns.decisions["park_for_prompt"] > num_staged(bench)


def test_parked_from_the_start() -> None:
    bench, copies = crowded()
    name = until_staged(bench)
    seq = bench.scheduler.get(name)
    assert seq is not None
    assert (seq.state, seq.slot, seq.backing.slot) == (State.PARKED, None, None)
    assert seq.num_computed == len(seq.prompt_token_ids)
    copies.end()
    bench.engine.step()
    assert len(seq.backing.rows) == seq.backing.end == -(-len(seq.prompt_token_ids) // T)
    finish(bench, REQUESTS)
