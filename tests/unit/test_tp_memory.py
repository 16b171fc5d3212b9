"""Memory of several ranks behind one driver: what one rank refuses has no effect on any.

Each rank has its own driver over real memory, in a thread that takes orders as a rank's process does. Every
chunk holds its own pattern on every rank, so a chunk that is not where the first rank thinks shows at once.
"""

from __future__ import annotations

import ctypes
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from engine.errors import DriverError, EngineDeadError
from engine.memory.copies import Direction, ThreadCopies
from engine.memory.vmm import Move, Outcome
from engine.tp.executor import MemoryExecutor
from engine.tp.followers import Followers
from engine.tp.mirrors import MirroredCopies, MirroredMemory
from engine.tp.order_loop import OrderLoop
from engine.tp.wire import pack
from tests.failing_memory import FailingVirtualMemory
from tests.unit.tp_cases import pair, run

CHUNK, CHUNKS, ROWS = 4096, 24, 40


class Ranks:
    """A driver of `size` ranks, and what is behind it.

    Attributes:
        memory: what the first rank's pool would call.
        vms: every rank's driver, the first rank's first.
    """

    def __init__(self, size: int) -> None:
        self.vms = [FailingVirtualMemory(CHUNK, CHUNKS) for _ in range(size)]
        links, self._threads, self.executors = [], [], []
        for vm in self.vms[1:]:
            ours, theirs = pair()
            executor = MemoryExecutor(
                vm,
                ThreadCopies(CHUNK),
                lambda *content, link=theirs: link.send(pack(content)),
                lambda run: None,
            )
            loop = OrderLoop(theirs, executor.orders, lambda one=executor: one.is_idle, executor.report)
            links.append(ours)
            self.executors.append(executor)
            self._threads.append(run(loop.serve))
        self.followers = Followers(links)
        self.memory = MirroredMemory(self.vms[0], self.followers)
        self.base = self.memory.reserve(ROWS)
        self.mapped: dict[int, int] = {}  # row -> handle, as the first rank thinks
        self.handles: list[int] = []

    def address(self, row: int) -> int:
        return self.base + row * CHUNK

    def close(self) -> None:
        self.memory.close()
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()
        for vm in self.vms[1:]:
            vm.close()

    def stamp(self, row: int, handle: int) -> None:
        """Write the chunk's own pattern on every rank."""
        for place in self._everywhere(row):
            ctypes.memset(place, handle % 251 + 1, CHUNK)

    def check(self) -> None:
        """What is mapped is the same everywhere, chunk by chunk."""
        rows = sorted(self.mapped)
        for row in rows:
            for place in self._everywhere(row):
                assert ctypes.string_at(place, CHUNK) == bytes([self.mapped[row] % 251 + 1]) * CHUNK
        for vm in self.vms:
            assert len(vm._places) == len(rows)
            assert len(vm._handles) == len(self.handles)

    def _everywhere(self, row: int) -> list[int]:
        self.followers.ask("release", b"")  # an answer: what was sent before has been done
        packed = self.address(row).to_bytes(8, "little")
        return [self.address(row), *(one.addresses.translate(packed)[0] for one in self.executors)]


@contextmanager
def ranks_of(size: int) -> Iterator[Ranks]:
    ranks = Ranks(size)
    yield ranks
    ranks.close()


def test_a_rank_that_cannot_map_leaves_nothing_mapped_anywhere() -> None:
    with ranks_of(3) as ranks:
        ranks.handles = ranks.memory.create(4)
        for who in range(3):
            ranks.vms[who].refuse("map", after=2)
            with pytest.raises(DriverError):
                ranks.memory.map([ranks.address(row) for row in range(4)], ranks.handles)
            ranks.check()
        ranks.memory.map([ranks.address(row) for row in range(4)], ranks.handles)  # and then it can
        ranks.mapped = dict(enumerate(ranks.handles))
        for row, handle in ranks.mapped.items():
            ranks.stamp(row, handle)
        ranks.check()


def test_the_rank_with_the_least_room_decides_how_many_chunks_there_are() -> None:
    with ranks_of(3) as ranks:
        ranks.vms[2].refuse("create", after=3, times=None)
        ranks.handles = ranks.memory.create(8)
        assert len(ranks.handles) == 3
        ranks.check()


def test_a_rank_that_will_not_unmap_keeps_it_mapped_everywhere() -> None:
    with ranks_of(2) as ranks:
        ranks.handles = ranks.memory.create(4)
        addresses = [ranks.address(row) for row in range(4)]
        ranks.memory.map(addresses, ranks.handles)
        ranks.mapped = dict(enumerate(ranks.handles))
        for row, handle in ranks.mapped.items():
            ranks.stamp(row, handle)
        ranks.vms[1].refuse("unmap", after=1)
        assert ranks.memory.unmap(addresses) == 1
        del ranks.mapped[0]
        ranks.check()


@pytest.mark.parametrize("call", ["map", "unmap", "create", None])
@pytest.mark.parametrize("who", [0, 1, 2])
def test_moves_end_alike_on_all_ranks(call: str | None, who: int) -> None:
    with ranks_of(3) as ranks:
        ranks.handles = ranks.memory.create(3)
        ranks.memory.map([ranks.address(row) for row in range(2)], ranks.handles[:2])
        ranks.mapped = {0: ranks.handles[0], 1: ranks.handles[1]}
        for row, handle in ranks.mapped.items():
            ranks.stamp(row, handle)
        if call is not None:
            ranks.vms[who].refuse(call, times=None)
        moves = [
            Move(ranks.handles[0], ranks.address(0), ranks.address(10)),
            Move(ranks.handles[1], ranks.address(1), None),
            Move(None, None, ranks.address(11)),
        ]
        ticket = ranks.memory.submit(moves)
        moved = _collect(ranks, ticket)
        outcomes = [one.outcome for one in moved]
        expected = {
            None: [Outcome.DONE, Outcome.DONE, Outcome.DONE],
            "map": [Outcome.UNMAPPED, Outcome.DONE, Outcome.UNMAPPED],
            "unmap": [Outcome.STAYED, Outcome.STAYED, Outcome.DONE],
            "create": [Outcome.DONE, Outcome.DONE, Outcome.NOT_MADE],
        }[call]
        assert outcomes == expected
        _note(ranks, moves, moved)
        ranks.check()


def _collect(ranks: Ranks, ticket: int) -> list:
    """Refused while the threads are at it; what undoes it is not."""
    while not ranks.memory.is_done(ticket):
        time.sleep(0.001)
    for vm in ranks.vms:
        vm.allow()
    return ranks.memory.collect(ticket)


def _note(ranks: Ranks, moves: list[Move], moved: list) -> None:
    for move, one in zip(moves, moved, strict=True):
        row_of = lambda address: (address - ranks.base) // CHUNK  # noqa: E731
        if one.handle is not None and one.handle not in ranks.handles:
            ranks.handles.append(one.handle)
        if move.source and one.outcome is not Outcome.STAYED:
            ranks.mapped.pop(row_of(move.source), None)
        if move.target and one.outcome is Outcome.DONE:
            ranks.mapped[row_of(move.target)] = one.handle
            if move.handle is None:
                ranks.stamp(row_of(move.target), one.handle)


@pytest.mark.parametrize("seed", range(6))
def test_random_calls_with_refusals(seed: int) -> None:
    """Thousands of calls, some refused by some rank: after each, all ranks have the same mapped."""
    dice = random.Random(seed)
    with ranks_of(dice.choice([2, 3])) as ranks:
        acts: list[Callable[[], None]] = [
            lambda: _create(ranks, dice),
            lambda: _map(ranks, dice),
            lambda: _map(ranks, dice),
            lambda: _unmap(ranks, dice),
            lambda: _move(ranks, dice),
            lambda: _release(ranks, dice),
        ]
        for turn in range(150):
            if dice.random() < 0.3:
                vm = dice.choice(ranks.vms)
                vm.refuse(dice.choice(["create", "map"]), after=dice.randrange(4))
            dice.choice(acts)()
            for vm in ranks.vms:
                vm.allow()
            if turn % 10 == 0:
                ranks.check()
        ranks.check()


def _create(ranks: Ranks, dice: random.Random) -> None:
    ranks.handles += ranks.memory.create(min(dice.randint(1, 5), CHUNKS - len(ranks.handles)))


def _map(ranks: Ranks, dice: random.Random) -> None:
    loose = [one for one in ranks.handles if one not in ranks.mapped.values()]
    rows = [row for row in range(ROWS) if row not in ranks.mapped]
    pairs = list(zip(dice.sample(rows, min(3, len(rows))), loose, strict=False))
    try:
        ranks.memory.map([ranks.address(row) for row, _ in pairs], [handle for _, handle in pairs])
    except DriverError:
        return
    for row, handle in pairs:
        ranks.mapped[row] = handle
        ranks.stamp(row, handle)


def _unmap(ranks: Ranks, dice: random.Random) -> None:
    rows = dice.sample(sorted(ranks.mapped), min(2, len(ranks.mapped)))
    assert ranks.memory.unmap([ranks.address(row) for row in rows]) == len(rows)
    for row in rows:
        del ranks.mapped[row]


def _move(ranks: Ranks, dice: random.Random) -> None:
    free = [row for row in range(ROWS) if row not in ranks.mapped]
    moves = [
        Move(ranks.mapped[row], ranks.address(row), ranks.address(free.pop()))
        for row in dice.sample(sorted(ranks.mapped), min(2, len(ranks.mapped)))
    ]
    if len(ranks.handles) < CHUNKS - 2:
        moves.append(Move(None, None, ranks.address(free.pop())))
    ticket = ranks.memory.submit(moves)
    _note(ranks, moves, _collect(ranks, ticket))


def _release(ranks: Ranks, dice: random.Random) -> None:
    loose = [one for one in ranks.handles if one not in ranks.mapped.values()][:2]
    assert ranks.memory.release(loose) == len(loose)
    ranks.handles = [one for one in ranks.handles if one not in loose]


def test_copies_have_ended_when_they_have_on_every_rank() -> None:
    with ranks_of(2) as ranks:
        ranks.handles = ranks.memory.create(2)
        ranks.memory.map([ranks.address(0), ranks.address(1)], ranks.handles)
        ranks.mapped = dict(enumerate(ranks.handles))
        for row, handle in ranks.mapped.items():
            ranks.stamp(row, handle)
        copies = MirroredCopies(ThreadCopies(CHUNK), ranks.followers)
        ticket = copies.submit(Direction.OUT, [ranks.address(1)], [ranks.address(0)], False)
        ticket.wait()
        assert ticket.is_done
        ranks.mapped[1] = ranks.mapped[0]  # by content
        for place in ranks._everywhere(1):
            assert ctypes.string_at(place, 1)[0] == ranks.handles[0] % 251 + 1
        copies.close()


def test_a_rank_that_is_gone_is_told_of() -> None:
    ranks = Ranks(2)
    ranks.followers.close()
    with pytest.raises(EngineDeadError, match="is gone"):
        ranks.memory.create(1)
    for vm in ranks.vms[1:]:
        vm.close()


def test_ranks_that_cannot_be_brought_together_end_the_engine() -> None:
    with ranks_of(2) as ranks:
        ranks.handles = ranks.memory.create(2)
        ranks.vms[1].refuse("map", after=1)
        ranks.vms[0].refuse("unmap")  # what the first rank mapped, it cannot undo
        with pytest.raises(EngineDeadError, match="disagree"):
            ranks.memory.map([ranks.address(0), ranks.address(1)], ranks.handles)
