"""Sequences that leave the device and come back: what moves, what stays, and that nothing is mixed up."""

from __future__ import annotations

import gc

import pytest
import torch

from engine.memory import ahead
from engine.memory.kv_geometry import KvGeometry
from tests.fakes import CHUNK_BYTES, HeldTicket
from tests.unit.parking_cases import GROUPS, IN, LONGEST, OUT, STAGES, Guest, T, Yard

LEAVING = [(layers, count) for layers in (1, 4, 5) for count in range(layers + 1)]


def geometry_of(num_groups: int) -> KvGeometry:
    """One layer a group."""
    geometry = KvGeometry.choose(num_groups, 2, 8, 4, CHUNK_BYTES, layers_per_group=1)
    assert geometry.num_groups == num_groups
    return geometry


@pytest.mark.parametrize(("num_groups", "num_leaving"), LEAVING)
def test_whatever_leaves_comes_back_as_it_was(num_groups: int, num_leaving: int) -> None:
    yard = Yard(geometry=geometry_of(num_groups))
    guest = yard.guest(3 * T + 7)
    before, free = yard.content(guest).clone(), yard.pool.chunks.num_free
    yard.leave(guest, num_leaving * 4)
    every_other_first = [*range(0, num_groups, 2), *range(1, num_groups, 2)]
    assert guest.backing.absent == set(every_other_first[:num_leaving])
    assert yard.pool.chunks.num_free == free + num_leaving * 4
    assert yard.parking.num_idle == (num_groups - num_leaving) * 4
    assert yard.num_held == num_groups * 4, "what stays is in the balloon as well"
    yard.soil()
    assert guest.backing.absent == set(every_other_first[:num_leaving]), "nobody was short of memory"
    yard.back(guest)
    assert torch.equal(yard.content(guest), before)
    assert yard.copies.bytes_moved(IN) == num_leaving * 4 * CHUNK_BYTES, "what stayed was not copied back"
    assert yard.parking.num_idle == 0


def test_it_goes_on_where_it_stopped_again_and_again() -> None:
    yard = Yard()
    guest = yard.guest(5)
    for until in (T - 1, T, T + 1, 3 * T + 5, 3 * T + 6, 5 * T, LONGEST):
        yard.leave(guest, 2 * GROUPS)
        yard.soil()
        yard.back(guest)
        assert yard.compute(guest, until)
        yard.verify(guest)
    yard.end(guest)
    assert yard.num_held == 0


def test_only_rows_that_are_new_or_have_changed_are_copied_again() -> None:
    """A row that is full never changes: its copy stays valid while the sequence runs."""
    yard = Yard()
    guest = yard.guest(2 * T + 9)
    yard.leave(guest)
    yard.back(guest)
    assert yard.num_held == 2 * GROUPS, "the tail is written on: its copy is of no use any more"
    assert yard.compute(guest, 3 * T + 1)
    moved = yard.copies.bytes_moved(OUT)
    yard.leave(guest)
    assert yard.copies.bytes_moved(OUT) - moved == 2 * GROUPS * CHUNK_BYTES
    yard.soil()
    yard.back(guest)


def test_with_nothing_to_copy_it_has_left_at_once() -> None:
    yard = Yard()
    guest = yard.guest(3 * T)
    yard.leave(guest)
    yard.back(guest)
    moved = yard.copies.bytes_moved(OUT)
    assert yard.park(guest)
    assert not guest.backing.is_leaving
    assert yard.copies.bytes_moved(OUT) == moved
    yard.soil()
    yard.back(guest)


def test_rows_that_were_reserved_and_not_written_are_not_kept() -> None:
    yard = Yard()
    guest = yard.guest(2 * T)
    assert yard.pool.reserve([(guest.held_slot, 4 * T)], 1, 1)
    yard.leave(guest, 0)
    assert yard.parking.num_idle == yard.num_held == yard.pool.snapshot().kv == 2 * GROUPS
    yard.back(guest)


def test_what_is_read_through_another_slot_stays_there() -> None:
    yard = Yard()
    source = yard.guest(2 * T + 20)
    yard.end(source)
    guest = yard.guest(4 * T + 3, prefix=source.known[: 2 * T])
    assert guest.opened.shared_tokens == 2 * T
    yard.leave(guest)
    assert (guest.backing.first, guest.backing.end) == (2, 5)
    assert yard.copies.bytes_moved(OUT) == 3 * GROUPS * CHUNK_BYTES
    assert yard.pool.num_evictable == GROUPS, "all but the last block of the source is still read"
    assert guest.backing.slot == guest.opened.slot, "nowhere else could it find its beginning"
    yard.soil()
    yard.back(guest)
    yard.end(guest)
    assert yard.pool.snapshot().kv == 0


@pytest.mark.parametrize("num_leaving", range(GROUPS + 1))
def test_the_beginning_that_others_read_stays(num_leaving: int) -> None:
    yard = Yard()
    guest = yard.guest(3 * T + 4)
    reader = yard.guest(2 * T + 9, prefix=guest.known[: 2 * T])
    assert (reader.opened.shared_slot, reader.opened.shared_tokens) == (guest.slot, 2 * T)
    yard.leave(guest, num_leaving * 2)
    assert (guest.backing.first, guest.backing.end) == (2, 4)
    assert len(guest.backing.absent) == num_leaving
    yard.soil()
    yard.verify(reader)
    assert yard.compute(reader, 4 * T)
    yard.back(guest)
    assert guest.slot == guest.opened.slot
    yard.verify(reader)


@pytest.mark.parametrize("ends_first", ["guest", "reader"])
def test_both_sides_of_a_shared_beginning_can_be_parked(ends_first: str) -> None:
    yard = Yard()
    guest = yard.guest(3 * T + 4)
    reader = yard.guest(4 * T + 9, prefix=guest.known[: 2 * T])
    yard.leave(guest)
    yard.leave(reader)
    yard.soil()
    first, second = (guest, reader) if ends_first == "guest" else (reader, guest)
    yard.end(first)
    yard.soil()
    yard.back(second)
    yard.end(second)
    assert yard.pool.snapshot().kv == yard.num_held == 0


def test_a_sequence_that_others_read_wholly_cannot_leave() -> None:
    yard = Yard()
    guest = yard.guest(2 * T)
    reader = yard.guest(2 * T + 9, prefix=guest.known[: 2 * T])
    before = facts(yard)
    assert not yard.park(guest)
    assert facts(yard) == before
    yard.verify(guest)
    yard.end(reader)
    yard.pool.trim(drops_cache=True)  # what the reader has left is read through the slot, too
    yard.leave(guest)
    assert guest.backing.slot is None


def test_what_only_a_parked_sequence_has_is_found_by_nobody_until_it_is_back() -> None:
    yard = Yard()
    guest = yard.guest(3 * T)
    yard.leave(guest, GROUPS)
    twin = yard.guest(3 * T + 1, prefix=guest.known[: 3 * T])
    assert twin.opened.num_tokens == 0
    yard.end(twin)
    assert yard.pool.trim(drops_cache=True)
    yard.back(guest)
    reader = yard.guest(3 * T + 1, prefix=guest.known[: 3 * T])
    assert (reader.opened.shared_slot, reader.opened.shared_tokens) == (guest.slot, 3 * T)
    yard.verify(reader)


def test_what_stays_of_a_parked_sequence_is_found() -> None:
    yard = Yard()
    guest = yard.guest(3 * T + 4)
    reader = yard.guest(2 * T + 9, prefix=guest.known[: 2 * T])
    yard.leave(guest)
    another = yard.guest(2 * T + 3, prefix=guest.known[: 2 * T])
    assert another.opened.shared_tokens == 2 * T
    for one in (reader, another):
        yard.verify(one)
        yard.end(one)
    yard.back(guest)


def test_a_slot_with_nothing_left_in_it_is_had_by_others() -> None:
    yard = Yard()
    guest = yard.guest(3 * T + 1)
    slot = guest.slot
    yard.leave(guest)
    assert guest.backing.slot is None
    calls = yard.pool.snapshot().driver_calls
    other = yard.guest(4 * T)
    assert (other.slot, yard.pool.snapshot().driver_calls) == (slot, calls), "the rows were still mapped"
    yard.back(guest)
    assert guest.slot != slot
    yard.verify(other)
    assert yard.compute(guest, 4 * T)
    yard.verify(guest)


def test_without_a_slot_it_stays_parked() -> None:
    yard = Yard(num_slots=2)
    guest = yard.guest(3 * T + 1)
    yard.leave(guest)
    others = [yard.guest(T), yard.guest(T)]
    before = facts(yard)
    assert not yard.parking.bring_back(guest.backing, 0)
    assert facts(yard) == before
    yard.end(others[0])
    yard.back(guest)
    yard.verify(others[1])


def _scattered(monkeypatch: pytest.MonkeyPatch, total: int) -> tuple[Yard, Guest]:
    """A parked sequence of 6 rows; what is free is mapped in other slots, two rows in each."""
    monkeypatch.setattr(ahead, "_LEAST_AT_ONCE", 4)
    monkeypatch.setattr(ahead, "_MAX_SENT", 4)
    yard = Yard(total, num_slots=20)
    guest = yard.guest(5 * T + 1)
    yard.leave(guest)
    visitors = []
    while yard.pool.chunks.num_free > 12:
        visitors.append(yard.guest(2 * T))
    for visitor in visitors:
        yard.pool.close_slot(visitor.held_slot, visitor.chain, ())
    return yard, guest


def _tries(yard: Yard, guest: Guest) -> int:
    """How often a return beside short steps is tried until it begins."""
    for tries in range(1, 20):
        if yard.parking.bring_back(guest.backing, 0, step_s=0.0):
            return tries
        yard.pool.check()
        yard.pool.chunks.receive(wait=True)
        yard.pool.check()
    raise AssertionError("it never comes back")


def test_memory_for_a_return_is_mapped_beside_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    yard, guest = _scattered(monkeypatch, 90)
    before = yard.pool.snapshot().driver_calls
    assert _tries(yard, guest) == 3  # 10 of 24 places are to be mapped: 4, 4, and the last two with the copy
    assert yard.pool.snapshot().driver_calls - before <= 2 * 4
    yard.arrive(guest)
    yard.verify(guest)


def test_a_return_beside_long_steps_is_mapped_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    yard, guest = _scattered(monkeypatch, 90)
    assert yard.parking.bring_back(guest.backing, 0, step_s=0.1)
    yard.arrive(guest)
    yard.verify(guest)


def test_a_return_does_not_wait_for_chunks_that_are_kept_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held for growth, they count as room, and the mapping thread does not touch them."""
    yard, guest = _scattered(monkeypatch, 90)
    other = yard.guest(T)
    for rows in (3, 5, 7):
        yard.pool.ahead.grow([(other.held_slot, rows * T)], 0)
        yard.pool.chunks.receive(wait=True)
    yard.pool.ahead.grow([(other.held_slot, 7 * T)], 0)
    yard.pool.chunks.receive(wait=True)
    taken = yard.pool.chunks.take(-yard.parking.num_lacking(guest.backing, 0), "kv")
    assert taken is not None
    assert yard.pool.chunks.num_spare < 4 < 24 <= yard.pool.chunks.num_free
    assert _tries(yard, guest) < 4
    yard.pool.chunks.put_back(taken)
    yard.arrive(guest)
    yard.verify(guest)


def test_without_room_it_stays_parked() -> None:
    yard = Yard(total=38)
    guest = yard.guest(3 * T + 1)
    yard.leave(guest, 2 * 4)
    other = yard.guest(5 * T)
    lacking = yard.parking.num_lacking(guest.backing, 0)
    assert lacking > 0
    before = facts(yard)
    assert not yard.parking.bring_back(guest.backing, 0)
    assert facts(yard) == before
    yard.end(other)
    yard.pool.trim(drops_cache=True)
    left = -yard.parking.num_lacking(guest.backing, 0)
    assert left == yard.pool.room_for_kv(T // 2, 1) - GROUPS * 4
    assert not yard.parking.bring_back(guest.backing, left + 1)
    assert yard.parking.bring_back(guest.backing, left)
    yard.arrive(guest)
    yard.verify(guest)


def test_what_stays_makes_room_group_by_group_when_others_need_it() -> None:
    yard = Yard(total=32)
    guest = yard.guest(4 * T)
    yard.leave(guest, 0)
    slot, other, absent = guest.backing.slot, yard.guest(T), []
    assert yard.pool.room_for_kv(T // 2, 1) == 2 * GROUPS + 4 * GROUPS, "what is in the balloon too is room"
    while yard.compute(other, other.num_computed + T):
        yard.pool.check()
        absent.append(len(guest.backing.absent))
        assert yard.parking.num_idle == (GROUPS - absent[-1]) * 4
        assert guest.backing.slot == (slot if absent[-1] < GROUPS else None)
    assert absent == [0, 0, 1, 2, 3, 4]
    yard.verify(other)
    yard.end(other)
    yard.pool.trim(drops_cache=True)
    yard.back(guest)


def test_who_was_parked_last_makes_room_first() -> None:
    yard = Yard()
    first, last = yard.guest(2 * T), yard.guest(2 * T)
    yard.leave(first, 0)
    yard.leave(last, 0)
    yard.parking.evict(2 * GROUPS + 1)
    assert (len(first.backing.absent), len(last.backing.absent)) == (1, GROUPS)
    yard.pool.check()
    yard.soil()
    yard.back(last)
    yard.back(first)


def test_cached_prefixes_and_the_arena_go_before_what_is_parked() -> None:
    yard = Yard(total=60)
    yard.end(yard.guest(4 * T))
    guest = yard.guest(3 * T)
    yard.leave(guest, 0)
    assert yard.pool.snapshot().cached == 4 * GROUPS
    assert yard.guest(8 * T).num_computed == 8 * T
    assert guest.backing.absent == set()
    assert yard.pool.snapshot().cached < 4 * GROUPS


def test_a_balloon_without_room_changes_nothing() -> None:
    yard = Yard(host=3 * GROUPS)
    guest = yard.guest(3 * T + 1)
    before, content = facts(yard), yard.content(guest).clone()
    assert not yard.park(guest)
    assert facts(yard) == before
    assert torch.equal(yard.content(guest), content)
    assert yard.compute(guest, 4 * T)
    smaller = yard.guest(3 * T)
    yard.leave(smaller)
    yard.soil()
    yard.verify(guest)
    yard.back(smaller)


def saved_and_running(yard: Yard, num_rows: int) -> Guest:
    """A sequence on the device, whose full rows are in the balloon as well."""
    guest = yard.guest(num_rows * T + 1)
    yard.leave(guest)
    yard.back(guest)
    assert len(guest.backing.rows) == num_rows
    return guest


def test_copies_of_sequences_that_run_give_way_when_the_balloon_is_full() -> None:
    yard = Yard(total=200, host=8 * GROUPS)
    older, newer = saved_and_running(yard, 2), saved_and_running(yard, 3)
    guest = yard.guest(5 * T)
    yard.leave(guest)
    assert (older.backing.rows, len(newer.backing.rows)) == ([], 3), "the one saved first, and no more"
    assert yard.num_held == 8 * GROUPS
    for one in (older, newer):
        yard.verify(one)
    yard.soil()
    yard.back(guest)
    yard.end(guest)
    assert yard.compute(older, 3 * T)
    yard.leave(older)
    yard.soil()
    yard.back(older)


def test_copies_of_which_one_is_just_being_made_do_not_give_way() -> None:
    """When it ends, it has to find those before it in their place."""
    yard = Yard(total=200, host=8 * GROUPS)
    running = saved_and_running(yard, 2)
    assert yard.compute(running, 3 * T)
    assert save(yard, running) == 1
    guest = yard.guest(7 * T)
    assert not yard.park(guest)
    assert len(running.backing.rows) == 2
    yard.settle()
    yard.leave(guest)
    assert running.backing.rows == []
    yard.end(guest)
    yard.leave(running)
    yard.soil()
    yard.back(running)


def test_copies_do_not_give_way_in_vain() -> None:
    yard = Yard(total=200, host=7 * GROUPS)
    running = saved_and_running(yard, 3)
    guest = yard.guest(8 * T)
    before = facts(yard)
    assert not yard.park(guest)
    assert facts(yard) == before
    assert len(running.backing.rows) == 3


def test_copies_do_not_give_way_in_vain_in_a_balloon_that_was_deflated() -> None:
    """Of three rows, two would only make good what is taken beyond the order."""
    yard = Yard(total=200, host=10 * GROUPS)
    running, parked, guest = saved_and_running(yard, 3), yard.guest(3 * T), yard.guest(2 * T)
    yard.leave(parked)
    yard.parking.balloon.set_logical(4 * GROUPS)
    assert not yard.park(guest)
    assert len(running.backing.rows) == 3
    yard.parking.balloon.set_logical(5 * GROUPS)
    yard.leave(guest)
    assert running.backing.rows == []


def test_copies_of_parked_sequences_never_give_way() -> None:
    yard = Yard(host=6 * GROUPS)
    parked, guest = yard.guest(3 * T), yard.guest(4 * T)
    yard.leave(parked, 0)
    assert not yard.park(guest)
    yard.soil()
    yard.back(parked)


def facts(yard: Yard) -> tuple[object, ...]:
    """What must be the same if nothing has happened."""
    parking = yard.parking
    counts = (parking.num_idle, parking.num_leaving, yard.num_held, len(yard.copies.submitted))
    return yard.pool.snapshot(), yard.pool.num_free_slots, counts


# While a copy is under way


def test_nothing_is_let_go_of_before_its_copy_has_ended() -> None:
    yard = Yard(total=40)
    guest, neighbour = yard.guest(4 * T), yard.guest(3 * T)
    slot, free = guest.held_slot, yard.pool.chunks.num_free
    assert yard.park(guest)
    assert yard.parking.num_leaving == 4 * GROUPS
    for _ in range(3):
        yard.parking.settle()
        assert not yard.compute(neighbour, 7 * T), "its neighbour has to wait for the copy"
        yard.parking.evict(1000)
        assert all(yard.is_on_device(guest.backing, slot, group) for group in range(GROUPS))
        yard.copies.check(yard.copies.under_way[0])
        yard.pool.check()
    assert yard.pool.chunks.num_free <= free
    yard.settle()
    assert yard.parking.num_leaving == 0
    assert yard.compute(neighbour, 7 * T)
    yard.verify(neighbour)
    yard.end(neighbour)
    yard.pool.trim(drops_cache=True)
    yard.back(guest)


def test_what_is_written_by_a_step_in_flight_is_copied_too() -> None:
    """Copies to the host begin when the launched steps have ended."""
    yard = Yard()
    guest = yard.guest(2 * T)
    assert yard.launch(guest, 2 * T + 3)
    assert yard.park(guest)
    assert [ticket.after_steps for ticket in yard.copies.submitted] == [True]
    yard.finish()
    yard.settle()
    yard.soil()
    yard.back(guest)


def test_copies_are_taken_in_one_by_one() -> None:
    yard = Yard()
    guests = [yard.guest(2 * T + at) for at in range(3)]
    for guest in guests:
        assert yard.park(guest)
    yard.copies.end(yard.copies.submitted[1])
    yard.parking.settle()
    yard.pool.check()
    assert [guest.backing.is_leaving for guest in guests] == [False, False, True]
    assert yard.parking.is_moving
    yard.parking.wait()
    yard.pool.check()
    assert not guests[2].backing.is_leaving
    assert not yard.parking.is_moving
    yard.soil()
    for guest in guests:
        yard.back(guest)


def test_a_sequence_that_leaves_cannot_be_brought_back_yet() -> None:
    yard = Yard()
    guest = yard.guest(2 * T)
    assert yard.park(guest, 0)
    assert not yard.parking.bring_back(guest.backing, 0)
    yard.settle()
    yard.back(guest)


def test_it_is_not_back_before_its_copy_has_ended() -> None:
    yard = Yard()
    guest = yard.guest(3 * T + 4)
    yard.leave(guest, 8)
    assert yard.parking.bring_back(guest.backing, 0)
    slot = guest.backing.slot
    assert slot is not None
    assert not yard.parking.is_back(guest.backing)
    yard.parking.evict(1000)
    yard.soil()
    yard.parking.settle()
    assert not yard.parking.is_back(guest.backing)
    assert all(yard.is_on_device(guest.backing, slot, group) for group in range(GROUPS))
    yard.arrive(guest)
    yard.verify(guest)


def test_rows_that_a_step_in_flight_reads_are_written_after_it() -> None:
    """They may be backed again at once: no driver call, and the copy waits for the step."""
    yard = Yard()
    guest = yard.guest(2 * T)
    yard.leave(guest)
    yard.back(guest)
    other = yard.guest(T)
    assert yard.launch(other, T + 1)  # it reads every slot, for all that is known
    free = yard.pool.chunks.num_free
    assert yard.park(guest, GROUPS)
    assert not guest.backing.is_leaving
    assert len(guest.backing.absent) == 2
    assert (yard.pool.chunks.num_free, yard.pool.chunks.num_retiring) == (free, 4)
    assert yard.parking.bring_back(guest.backing, 0)
    assert yard.copies.submitted[-1].after_steps
    assert yard.pool.chunks.num_retiring == 0
    yard.finish()
    yard.arrive(guest)
    yard.verify(guest)


def test_rows_that_no_step_reads_are_written_at_once() -> None:
    yard = Yard()
    guest = yard.guest(2 * T)
    yard.leave(guest)
    yard.back(guest)
    assert not yard.copies.submitted[-1].after_steps


@pytest.mark.parametrize(
    ("stage", "has_reader"),
    [(stage, has_reader) for stage in STAGES for has_reader in (False, True)][:-1],
)
def test_a_sequence_may_end_at_any_stage(stage: str, has_reader: bool) -> None:
    yard = Yard()
    guest, other = yard.guest(3 * T + 4), yard.guest(2 * T + 5)
    reader = yard.guest(2 * T + 9, prefix=guest.known[: 2 * T]) if has_reader else None
    before = yard.pool.chunks.num_free
    yard.reach(guest, stage)
    yard.end(guest)
    assert yard.copies.under_way == [], "it was waited for"
    assert yard.num_held == yard.parking.num_idle == yard.parking.num_leaving == 0
    assert yard.pool.chunks.num_free == before + (2 if has_reader else 4) * GROUPS
    yard.soil()
    for one in filter(None, (other, reader)):
        yard.verify(one)
        yard.end(one)
    assert yard.pool.snapshot().kv == 0


def test_a_sequence_may_end_while_others_are_on_their_way() -> None:
    yard = Yard()
    guests = [yard.guest(2 * T + at) for at in range(6)]
    yard.leave(guests[4])
    yard.leave(guests[5])
    assert yard.parking.bring_back(guests[4].backing, 0)
    assert yard.parking.bring_back(guests[5].backing, 0)
    for guest in guests[:4]:
        assert yard.park(guest)
    yard.end(guests[1])
    yard.end(guests[4])
    assert [guest.backing.is_leaving for guest in guests[:4]] == [False, False, True, True]
    yard.settle()
    yard.arrive(guests[5])
    yard.verify(guests[5])
    for at in (0, 2, 3):
        yard.back(guests[at])


def is_mapped(address: int) -> bool:
    """Whether that may be read and written."""
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[:2] for line in maps]
    return any(
        int(span.split("-")[0], 16) <= address < int(span.split("-")[1], 16) and rights.startswith("rw")
        for span, rights in ranges
    )


@pytest.mark.parametrize("stage", STAGES)
def test_memory_of_a_dropped_pool_stays_while_it_is_copied(stage: str) -> None:
    yard = Yard()
    guests = [yard.guest(3 * T + 4), yard.guest(2 * T)]
    yard.reach(guests[0], stage)
    assert yard.park(guests[1])
    copies = yard.copies
    mapped: list[bool] = []

    def look(ticket: HeldTicket) -> None:
        mapped.extend(is_mapped(address) for address in (*ticket.sources, *ticket.targets))

    copies.check = look
    copies.fails = lambda ticket: not all(mapped)  # or the copy would end the process
    del yard, guests
    gc.collect()
    for ticket in copies.under_way:
        ticket.wait()
    assert copies.under_way == []
    assert mapped
    assert all(mapped)


# Saved ahead


def save(yard: Yard, guest: Guest, num_rows: int = 1000) -> int:
    """Begin to save so many more rows of a sequence that runs; how many it were."""
    row_bytes = GROUPS * CHUNK_BYTES
    num_bytes = yard.parking.save(guest.backing, guest.held_slot, guest.num_computed, num_rows * row_bytes)
    assert num_bytes % row_bytes == 0
    yard.pool.check()
    return num_bytes // row_bytes


def test_rows_that_are_saved_ahead_are_not_copied_again() -> None:
    yard = Yard()
    guest = yard.guest(4 * T + 2)
    assert save(yard, guest, 3) == 3
    assert yard.compute(guest, 4 * T + 5), "it goes on beside the copy"
    yard.settle()
    assert yard.num_held == 3 * GROUPS
    yard.leave(guest)
    assert yard.copies.bytes_moved(OUT) == (3 + 2) * GROUPS * CHUNK_BYTES
    yard.soil()
    yard.back(guest)


def test_only_full_rows_are_saved_and_each_once() -> None:
    yard = Yard()
    guest = yard.guest(4 * T + T - 1)
    assert save(yard, guest, 1) == 1
    yard.settle()
    assert save(yard, guest) == 3
    yard.settle()
    assert save(yard, guest) == 0
    assert yard.compute(guest, 5 * T)
    assert save(yard, guest) == 1
    yard.settle()
    assert yard.num_held == 5 * GROUPS
    assert yard.park(guest)
    assert not guest.backing.is_leaving, "with everything saved there is nothing to wait for"
    yard.soil()
    yard.back(guest)


def test_what_others_read_is_not_saved() -> None:
    yard = Yard()
    guest = yard.guest(4 * T)
    reader = yard.guest(2 * T + 9, prefix=guest.known[: 2 * T])
    assert save(yard, guest) == 2
    yard.settle()
    yard.end(reader)
    yard.pool.trim(drops_cache=True)
    assert save(yard, guest) == 4, "from its beginning, now that nobody reads that: the books have no gap"
    yard.settle()
    assert yard.num_held == 4 * GROUPS
    yard.leave(guest)
    yard.soil()
    yard.back(guest)


def test_a_sequence_that_is_parked_while_it_is_saved_waits_for_that() -> None:
    yard = Yard()
    guest = yard.guest(4 * T)
    assert save(yard, guest, 3) == 3
    assert yard.parking.is_copying
    assert not yard.parking.is_moving, "nobody waits for it"
    assert yard.park(guest)
    assert yard.parking.is_moving
    assert [ticket.is_done for ticket in yard.copies.submitted] == [True, False]
    assert yard.copies.bytes_moved(OUT) == 4 * GROUPS * CHUNK_BYTES
    yard.settle()
    yard.soil()
    yard.back(guest)


def test_a_sequence_that_ends_while_it_is_saved_keeps_its_rows_until_then() -> None:
    yard = Yard()
    guest = yard.guest(4 * T)
    assert save(yard, guest) == 4
    yard.end(guest)
    assert yard.copies.under_way == []
    assert yard.num_held == 0
    assert yard.pool.snapshot().cached == 4 * GROUPS


def test_nobody_gives_way_for_what_is_saved_ahead() -> None:
    yard = Yard(host=5 * GROUPS + 1)
    saved, guest = saved_and_running(yard, 3), yard.guest(4 * T)
    assert save(yard, guest) == 2, "as much as there is room for"
    yard.settle()
    assert len(saved.backing.rows) == 3
    assert save(yard, guest) == 0


def test_groups_of_parked_sequences_can_be_had_while_a_step_runs() -> None:
    """It does not read them: waiting for it would cost the engine the step it is ahead."""
    yard = Yard()
    guest, other = yard.guest(2 * T), yard.guest(T)
    yard.leave(guest, 0)
    assert yard.launch(other, T + 1)
    free = yard.pool.chunks.num_free
    yard.parking.evict(2)
    assert (yard.pool.chunks.num_free, yard.pool.chunks.num_retiring) == (free + 2, 0)
