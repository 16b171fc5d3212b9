"""Copies that fail, host memory that is not there, a driver that refuses: requests lose time, no more."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from engine.config import MemoryConfig, SchedulerConfig
from engine.errors import DriverError
from engine.memory.balloon import Balloon
from engine.memory.slabs import PlainSlabs, Slab
from engine.messages import GenerateRequest
from tests.failing_memory import FailingVirtualMemory
from tests.fakes import CHUNK_BYTES, Bench, HeldCopies, HeldTicket
from tests.unit.engine_cases import ask, finish, serve
from tests.unit.parking_cases import GROUPS, IN, OUT, T, Yard, filled, num_parkings, watch

REQUESTS = [replace(ask(f"r{at}", 20 + 7 * at, 90), tpot_slo_s=0.01) for at in range(4)]
MAX_STEPS = 3000
LIMITS = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64, turn_tokens=4, min_retained_chunks=0)


def failing(yard: Yard, fails: Callable[[HeldTicket], bool]) -> None:
    yard.copies.fails = fails


def always(ticket: HeldTicket) -> bool:
    return True


def never(ticket: HeldTicket) -> bool:
    return False


# One sequence


def test_a_sequence_whose_copy_failed_is_still_where_it_was() -> None:
    yard = Yard()
    guest = yard.guest(3 * T + 4)
    before, slot, free = yard.content(guest).clone(), guest.held_slot, yard.pool.chunks.num_free
    assert yard.park(guest)
    failing(yard, always)
    yard.settle()
    assert guest.backing.has_failed
    assert not guest.backing.is_leaving
    assert guest.backing.absent == set()
    assert yard.num_held == yard.parking.num_leaving == yard.parking.num_idle == 0
    assert yard.pool.chunks.num_free == free
    guest.slot = yard.parking.returned(guest.backing, guest.chain, guest.num_computed)
    assert guest.slot == slot
    assert torch.equal(yard.content(guest), before)
    assert yard.compute(guest, 4 * T + 1)
    failing(yard, never)
    yard.leave(guest)
    assert not guest.backing.has_failed
    yard.soil()
    yard.back(guest)


def test_a_failed_copy_costs_nothing_that_was_in_the_balloon_before() -> None:
    yard = Yard()
    guest = yard.guest(2 * T)
    yard.leave(guest)
    yard.back(guest)
    assert yard.compute(guest, 4 * T)
    assert yard.park(guest)
    failing(yard, always)
    yard.settle()
    assert yard.num_held == 2 * GROUPS
    guest.slot = yard.parking.returned(guest.backing, guest.chain, guest.num_computed)
    failing(yard, never)
    yard.leave(guest)
    assert yard.copies.bytes_moved(OUT) == (2 + 2 + 2) * GROUPS * CHUNK_BYTES
    yard.soil()
    yard.back(guest)


def test_a_sequence_may_end_after_its_copy_failed() -> None:
    yard = Yard()
    guest = yard.guest(3 * T + 4)
    assert yard.park(guest)
    failing(yard, always)
    yard.settle()
    yard.end(guest)
    assert yard.num_held == 0
    assert yard.pool.snapshot().kv == 0


def test_a_sequence_may_end_while_its_copy_fails() -> None:
    yard = Yard()
    guest = yard.guest(3 * T + 4)
    assert yard.park(guest)
    failing(yard, always)
    yard.end(guest)
    assert yard.num_held == yard.parking.num_leaving == 0
    assert yard.pool.snapshot().kv == 0


def test_a_failed_copy_of_one_changes_nothing_for_the_next() -> None:
    yard = Yard()
    first, second = yard.guest(3 * T + 4), yard.guest(2 * T + 4)
    assert yard.park(first)
    assert yard.park(second)
    failing(yard, lambda ticket: ticket is yard.copies.submitted[0])
    yard.settle()
    assert (first.backing.has_failed, second.backing.has_failed) == (True, False)
    first.slot = yard.parking.returned(first.backing, first.chain, first.num_computed)
    yard.soil()
    yard.verify(first)
    yard.back(second)


def test_a_sequence_whose_copy_back_failed_is_lost_and_its_memory_is_not() -> None:
    for num_leaving in (GROUPS, 2):
        yard = Yard()
        guest = yard.guest(3 * T + 4)
        yard.leave(guest, num_leaving * 4)
        assert yard.parking.bring_back(guest.backing, 0)
        failing(yard, always)
        yard.copies.end()
        assert yard.parking.is_back(guest.backing)
        assert guest.backing.is_lost
        yard.end(guest)
        assert yard.num_held == 0
        assert yard.pool.snapshot().kv == yard.pool.snapshot().cached == 0, "nobody finds what is not its KV"
        failing(yard, never)
        yard.soil()


def test_what_others_read_of_a_lost_sequence_is_still_theirs() -> None:
    yard = Yard()
    guest = yard.guest(3 * T + 4)
    reader = yard.guest(2 * T + 9, prefix=guest.known[: 2 * T])
    yard.leave(guest)
    assert yard.parking.bring_back(guest.backing, 0)
    failing(yard, always)
    yard.copies.end()
    assert yard.parking.is_back(guest.backing)
    assert guest.backing.is_lost
    yard.end(guest)
    failing(yard, never)
    yard.soil()
    yard.verify(reader)
    again = yard.guest(3 * T + 4, prefix=guest.known[: 3 * T + 4])
    assert again.opened.num_tokens == 2 * T
    yard.verify(again)


@pytest.mark.parametrize("call", ["create", "map", "access"])
@pytest.mark.parametrize("num_leaving", [GROUPS, 2])
def test_a_sequence_that_the_driver_does_not_map_stays_parked(call: str, num_leaving: int) -> None:
    vm = FailingVirtualMemory(CHUNK_BYTES, 120)
    yard = Yard(vm=vm)
    guest = yard.guest(3 * T + 4)
    yard.leave(guest, num_leaving * 4)
    yard.pool.trim(drops_cache=True)  # or its rows would still be mapped there
    free, idle, slots = yard.pool.chunks.num_free, yard.parking.num_idle, yard.pool.num_free_slots
    vm.refuse(call, after=2)
    assert not yard.parking.bring_back(guest.backing, 0)
    assert vm.refusals.num_refused[call] == 1
    yard.pool.check()
    yard.pool.chunks.ask_again()
    assert (yard.pool.chunks.num_free, yard.parking.num_idle) == (free, idle)
    assert yard.pool.num_free_slots == slots
    assert [ticket.direction for ticket in yard.copies.submitted] == [OUT]
    yard.back(guest)


def test_rows_that_the_driver_does_not_unmap_are_nobodys_until_it_does() -> None:
    vm = FailingVirtualMemory(CHUNK_BYTES, 44)
    yard = Yard(total=44, vm=vm)
    guest = yard.guest(5 * T)
    yard.leave(guest)
    vm.refuse("unmap", times=3)
    other = yard.guest(T)
    yard.compute(other, 7 * T)
    yard.pool.check()
    vm.allow()
    assert yard.compute(other, 7 * T)
    yard.verify(other)
    yard.end(other)
    yard.pool.trim(drops_cache=True)
    yard.back(guest)


# A whole engine


def crowded(copies: HeldCopies, balloon: Balloon | None = None, total: int = 46) -> Bench:
    memory = MemoryConfig(map_ahead_tokens=0)
    bench = Bench(total, memory, LIMITS, balloon_chunks=400, copies=copies, balloon=balloon)
    watch(bench.pool, copies)
    return bench


def run_beside(bench: Bench, copies: HeldCopies, requests: Sequence[GenerateRequest]) -> None:
    """To the end, with copies that take a step or two."""
    for request in requests:
        bench.engine.submit(request)
    for _ in range(MAX_STEPS):
        if not bench.engine.step():
            break
        bench.pool.check()
        if len(copies.under_way) > 1:
            copies.end(copies.under_way[0])
    finish(bench, requests)
    assert bench.num_held == 0


@pytest.mark.usefixtures("steps_ahead")
@pytest.mark.parametrize(("direction", "share"), [(OUT, 0.3), (IN, 0.3), (IN, 1.0)])
def test_failed_copies_cost_time_and_no_token(direction: object, share: float) -> None:
    copies, dice = HeldCopies(), random.Random(3)
    bench = crowded(copies)
    filled(bench.balloon)
    copies.fails = lambda ticket: ticket.direction is direction and dice.random() < share
    run_beside(bench, copies, REQUESTS)
    assert any(ticket.has_failed for ticket in copies.submitted)
    if direction is IN:
        assert bench.scheduler.num_preemptions > 0, "what was lost was computed again"
    serve(bench, [ask("later", 40, 10)])


class Refusing:
    """A host that has so much memory to give, and no more."""

    def __init__(self, num_slabs: int) -> None:
        self.num_made = self.num_refused = 0
        self._num_slabs = num_slabs

    def make(self, nbytes: int) -> Slab:
        if self.num_made == self._num_slabs:
            self.num_refused += 1
            raise DriverError("cudaHostRegister", "out of memory")
        self.num_made += 1
        return PlainSlabs().make(nbytes)


@pytest.mark.usefixtures("steps_ahead")
def test_without_host_memory_sequences_are_computed_again() -> None:
    maker, copies = Refusing(0), HeldCopies()
    bench = crowded(copies, Balloon(maker, CHUNK_BYTES, 400, 100, lambda: 1 << 40))
    run_beside(bench, copies, REQUESTS)
    assert maker.num_refused == 1, "it is not asked at each step"
    assert copies.submitted == []
    assert num_parkings(bench) == 0
    assert bench.scheduler.num_preemptions > 0


@pytest.mark.usefixtures("steps_ahead")
def test_host_memory_that_ends_midway_is_used_as_far_as_it_goes() -> None:
    maker, copies = Refusing(2), HeldCopies()
    balloon = Balloon(maker, CHUNK_BYTES, 400, 2 * GROUPS, lambda: 1 << 40)
    bench = crowded(copies, filled(balloon))
    requests = [replace(ask(f"r{at}", 20 + 7 * at, 90), tpot_slo_s=0.01) for at in range(8)]
    run_beside(bench, copies, requests)
    bench.balloon.grow_ahead()
    assert (maker.num_made, maker.num_refused) == (2, 1)
    assert bench.balloon.num_physical == 4 * GROUPS
    assert copies.submitted
    assert bench.scheduler.num_preemptions > 0


@pytest.mark.usefixtures("steps_ahead")
def test_a_balloon_smaller_than_any_sequence_is_of_no_use_and_no_harm() -> None:
    copies = HeldCopies()
    bench = crowded(copies, filled(Balloon(PlainSlabs(), CHUNK_BYTES, GROUPS - 1, GROUPS - 1)))
    run_beside(bench, copies, REQUESTS)
    assert num_parkings(bench) == 0
    assert bench.scheduler.num_preemptions > 0


@pytest.mark.usefixtures("steps_ahead")
@pytest.mark.parametrize("seed", range(4))
def test_a_driver_that_refuses_now_and_then_loses_no_chunk(seed: int) -> None:
    dice, copies, vm = random.Random(seed), HeldCopies(), FailingVirtualMemory(CHUNK_BYTES, 46)
    bench = Bench(46, MemoryConfig(), LIMITS, balloon_chunks=400, copies=copies, vm=vm)
    filled(bench.balloon)
    watch(bench.pool, copies)
    for request in REQUESTS:
        bench.engine.submit(request)
    for _ in range(MAX_STEPS):
        if not bench.engine.step():
            break
        bench.pool.check()
        if dice.random() < 0.1:
            call = dice.choice(["create", "map", "access", "unmap", "release"])
            vm.refuse(call, after=dice.randrange(6), times=dice.randint(1, 2))
    vm.allow()
    bench.pool.chunks.ask_again()
    bench.run()
    whole = [one for one in REQUESTS if bench.deltas[one.request_id].finish_reason != "error"]
    assert whole, "the third refusal of a step costs one request, and only it"
    finish(bench, whole)
    assert vm.refusals.num_refused.total() > 0
    assert num_parkings(bench) > 0
    assert bench.num_held == 0
    vm.close()
