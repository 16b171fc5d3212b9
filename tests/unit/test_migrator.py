"""Migrations in two phases, and what becomes of them when something fails at any point of the way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from engine.errors import EngineDeadError
from engine.memory.kv_geometry import KvGeometry
from engine.memory.kv_stream import KvStreams
from engine.migration import Accepted, Declined, Migrated, MigrationOffer, MigrationResult, SequenceState
from engine.migrator import Migrator
from engine.sequence import Sequence
from tests.fakes import CHUNK_BYTES, GEOMETRY, Bench, answer
from tests.unit.migration_cases import REQUESTS, check, crowded, eventually, offer_of, said

T = TypeVar("T")
Hook = Callable[[], Awaitable[None]]
QUICK = KvStreams("127.0.0.1", CHUNK_BYTES, stall_s=0.5)


class Sender:
    """The shape of `TokenSender`, as far as migrations go.

    Attributes:
        is_open: whether the client still reads.
    """

    def __init__(self) -> None:
        self.handed: list[tuple[str, Migrated]] = []
        self.acknowledged_ids: list[str] = []
        self.is_open = True

    async def acknowledged(self, request_id: str) -> None:
        self.acknowledged_ids.append(request_id)

    def hand_over(self, request_id: str, migrated: Migrated) -> bool:
        self.handed.append((request_id, migrated))
        return self.is_open


class Wire:
    """The target as the source calls it, with something that happens before or after each of its answers."""

    def __init__(self, target: Migrator) -> None:
        self._target = target
        self.before: dict[str, Hook] = {}
        self.after: dict[str, Hook] = {}
        self.calls: list[str] = []

    async def prepare(self, offer: MigrationOffer) -> Accepted | Declined:
        return await self._call("prepare", self._target.prepare(offer))

    async def take_in(self, migration_id: str, state: SequenceState) -> Declined | None:
        return await self._call("take_in", self._target.take_in(migration_id, state))

    async def forget(self, migration_id: str) -> None:
        await self._call("forget", self._target.forget(migration_id))

    async def _call(self, name: str, call: Coroutine[Any, Any, T]) -> T:
        self.calls.append(name)
        try:
            if name in self.before:
                await self.before[name]()
        except BaseException:
            call.close()
            raise
        result = await call
        if name in self.after:
            await self.after[name]()
        return result


class Case:
    """A source with parked requests and a target, neither of which computes while a request moves."""

    def __init__(
        self, target: Bench | None = None, source: Bench | None = None, tpot_slo_s: float = 0.01
    ) -> None:
        self.requests = [replace(request, tpot_slo_s=tpot_slo_s) for request in REQUESTS]
        self.source = source or crowded(transport=QUICK)
        self.target = target or crowded(transport=QUICK)
        for request in self.requests:
            self.source.engine.submit(request)
        self.name = self._until_parked()
        self.sender = Sender()
        self.is_claimed = True

    def _until_parked(self) -> str:
        """Step until a request could move."""
        offer = offer_of(self.source)
        self.source.engine.migrations.stay(offer.migration_id)
        return offer.request_id

    def run(self, prepare: Callable[[Case, Wire], None] = lambda case, wire: None) -> MigrationResult:
        """One migration, after that was done to the wire."""

        async def scenario() -> MigrationResult:
            async with pumped(self.source), pumped(self.target):
                out = Migrator(self.source.engine, self.sender, lambda _: self.is_claimed)  # type: ignore[arg-type]
                wire = Wire(Migrator(self.target.engine, Sender(), lambda _: True))  # type: ignore[arg-type]
                prepare(self, wire)
                async with asyncio.timeout(60):
                    result = await out.send(wire, "other", self.name)
                self.calls = wire.calls
                return result

        result = asyncio.run(scenario())
        check(self.source, self.target)
        return result

    def claim(self) -> None:
        """The ingress calls for what has moved."""
        ((name, migrated),) = self.sender.handed
        assert (name, migrated.group_id) == (self.name, "other")
        assert self.target.engine.migrations.adopt(migrated.migration_id)

    def finish(self, but: str = "") -> None:
        """Both engines end: every answer is right and said once, and all memory is back."""
        self.source.run()
        self.target.run()
        for request in self.requests:
            if request.request_id != but:
                wanted = answer(request.prompt_token_ids, request.sampling.max_tokens)
                assert said(request, self.source, self.target) == wanted
        eventually(self._is_clean)
        for bench in (self.source, self.target):
            bench.assert_idle()
            assert not bench.engine._open
            assert len(bench.scheduler.free_seats) == 4
            assert not bench.engine.migrations.num_leaving
            assert not bench.engine.migrations.num_coming

    def _is_clean(self) -> bool:
        """Whether nobody holds host memory, once transfers that were given up have ended."""
        for bench in (self.source, self.target):
            bench.engine.migrations.expire(0.0)
            bench.engine.step()
            bench.pool.check()
        return self.source.num_held == self.target.num_held == 0


@asynccontextmanager
async def pumped(bench: Bench) -> AsyncIterator[None]:
    """Commands are carried out between the steps of an engine that makes none."""

    async def pump() -> None:
        while True:
            bench.engine._apply_orders()
            await asyncio.sleep(0.001)

    task = asyncio.create_task(pump())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def movable(bench: Bench) -> list[Sequence]:
    """Sequences that could move now."""
    parked = bench.scheduler.turns.parked
    return [seq for seq in parked if not bench.engine.migrations._hindrance(seq, 0.0)]


def raises(error: Exception) -> Hook:
    async def hook() -> None:
        raise error

    return hook


def test_a_request_moves_and_is_called_for() -> None:
    case = Case()
    result = case.run()
    assert result.outcome == "migrated", result
    assert result.request_id == case.name
    assert result.num_bytes > 0
    assert case.sender.acknowledged_ids == [case.name]
    assert case.calls == ["prepare", "take_in"]
    case.claim()
    case.finish()
    assert case.target.deltas[case.name].finish_reason == "length"


def test_a_request_whose_ingress_would_not_hear_of_it_stays() -> None:
    case = Case()
    case.is_claimed = False
    result = case.run()
    assert (result.outcome, case.sender.handed) == ("not_movable", [])
    case.finish()


def test_a_target_that_is_full_changes_nothing() -> None:
    case = Case(crowded(balloon_chunks=2, transport=QUICK))
    result = case.run()
    assert (result.outcome, case.sender.handed) == ("refused", [])
    assert "no room" in result.reason
    case.finish()


def test_a_target_without_a_seat_changes_nothing() -> None:
    case = Case(crowded(transport=QUICK))
    taken, case.target.scheduler.free_seats[:] = list(case.target.scheduler.free_seats), []
    assert case.run().outcome == "refused"
    case.target.scheduler.free_seats[:] = taken
    case.finish()


def test_another_geometry_is_refused_by_name_before_a_byte_moves() -> None:
    geometry = KvGeometry.choose(4, 2, 8, 4, CHUNK_BYTES, layers_per_group=2)
    assert geometry != GEOMETRY
    other = Bench(64, geometry=geometry, balloon_chunks=400, transport=QUICK)
    case = Case()
    case.target = other
    result = case.run()
    assert result.outcome == "refused"
    assert "layers_per_group is" in result.reason
    assert case.calls[0] == "prepare"
    assert "take_in" not in case.calls
    case.target = crowded(transport=QUICK)
    case.finish()


@pytest.mark.parametrize("at", ["prepare", "take_in"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_target_that_does_not_answer_leaves_the_request_where_it_was(at: str, when: str) -> None:
    """Also if it had done what was asked: what it has is never called for."""
    case = Case()

    def prepare(case: Case, wire: Wire) -> None:
        getattr(wire, when)[at] = raises(EngineDeadError("it is gone"))
        wire.before["forget"] = raises(EngineDeadError("it is gone"))

    result = case.run(prepare)
    assert (result.outcome, result.reason) == ("failed", "it is gone")
    case.finish()
    assert case.name not in case.target.deltas


@pytest.mark.parametrize("shares_memory", [True, False])
def test_a_transfer_that_is_cut_leaves_the_request_where_it_was(shares_memory: bool) -> None:
    transport = KvStreams("127.0.0.1", CHUNK_BYTES, shares_memory, stall_s=0.5)
    case = Case(crowded(transport=transport), crowded(transport=transport))

    def prepare(case: Case, wire: Wire) -> None:
        async def cut() -> None:
            (passage,) = case.target.pool.passages._passages  # type: ignore[union-attr]
            assert passage.transfer is not None
            passage.transfer.cancel()
            while not passage.transfer.is_done:
                await asyncio.sleep(0.001)

        wire.after["prepare"] = cut

    result = case.run(prepare)
    assert result.outcome == "failed"
    assert "silent" in result.reason
    case.finish()


@pytest.mark.parametrize("at", ["prepare", "take_in"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_request_can_be_cancelled_while_it_moves(at: str, when: str) -> None:
    """It ends once, where it still was."""
    case = Case()

    def prepare(case: Case, wire: Wire) -> None:
        async def cancel() -> None:
            case.source.engine.cancel(case.name)
            while case.name in [seq.request_id for seq in case.source.scheduler.unfinished()]:
                await asyncio.sleep(0.001)

        getattr(wire, when)[at] = cancel

    assert case.run(prepare).outcome == "failed"
    assert case.sender.handed == []
    assert case.source.deltas[case.name].finish_reason == "cancelled"
    assert case.calls[-1] == "forget"
    case.finish(but=case.name)
    assert case.name not in case.target.deltas


def test_a_client_that_leaves_in_the_last_moment_leaves_nothing_behind() -> None:
    case = Case()
    case.sender.is_open = False
    assert case.run().outcome == "failed"
    assert case.calls[-1] == "forget"
    case.finish(but=case.name)


def test_what_nobody_calls_for_is_forgotten() -> None:
    case = Case()
    assert case.run().outcome == "migrated"
    ((_, migrated),) = case.sender.handed
    assert case.target.num_held > 0
    case.target.engine.migrations.expire(0.0)
    assert case.target.num_held == 0
    assert not case.target.engine.migrations.adopt(migrated.migration_id)
    case.finish(but=case.name)


def test_only_one_of_two_calls_has_the_request() -> None:
    case = Case()
    case.run()
    case.claim()
    ((_, migrated),) = case.sender.handed
    assert not case.target.engine.migrations.adopt(migrated.migration_id)
    assert not case.target.engine.migrations.adopt("0" * 32)
    case.finish()


def test_tokens_that_are_held_back_travel_too() -> None:
    """The target hands them out when they are due."""
    case = Case(tpot_slo_s=0.2)
    accounts = case.source.engine._outlet._deposit._accounts
    while case.name not in accounts:
        assert case.source.engine.step()
        case.name = next((seq.request_id for seq in movable(case.source) if seq.request_id in accounts), "")
    num_held = len(accounts[case.name].deltas)
    assert case.run().outcome == "migrated"
    assert case.name not in accounts
    case.claim()
    handed_out = case.target.deltas[case.name].token_ids if case.name in case.target.deltas else ()
    assert len(handed_out) + case.target.engine._outlet.num_deposited == num_held > 0
    case.finish()


def test_what_is_not_parked_does_not_move() -> None:
    case = Case()
    for request in REQUESTS:
        seq = case.source.scheduler.get(request.request_id)
        if seq is not None and seq.state.value != "parked":
            offer = case.source.engine.migrations.leave(request.request_id, 0.0)
            assert offer == Declined("not_movable", f"it is {seq.state.value}, not parked")
    assert case.source.engine.migrations.leave("nobody", 0.0) == Declined(
        "not_movable", "there is no such request"
    )
    case.finish()


def test_one_that_has_come_stays_for_a_while() -> None:
    case = Case()
    case.run()
    case.claim()
    case.target.pool.parking.settle()  # type: ignore[union-attr]
    declined = case.target.engine.migrations.leave(case.name, min_stay_s=1e6)
    assert declined == Declined("not_movable", "it came from another engine a moment ago")
    case.finish()
