"""Batches end exactly as told, whichever call is refused; and the mapping thread, from start to end."""

from __future__ import annotations

import gc
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import DriverError
from engine.memory import native
from engine.memory.host_vmm import HostVirtualMemory
from engine.memory.vmm import Move, Moved, Outcome
from tests.failing_memory import CALLS, FailingVirtualMemory

CHUNK = 4096
TOTAL = 6
ROWS = 10

HAS_NATIVE = native.load() is not None
needs_native = pytest.mark.skipif(not HAS_NATIVE, reason="no C compiler")
both_mappers = pytest.mark.parametrize(
    "use_native", [pytest.param(True, marks=needs_native, id="native"), pytest.param(False, id="python")]
)


class Believer:
    """Uses a driver at random, and believes what it is told about what is made and what is mapped where."""

    def __init__(self, use_native: bool) -> None:
        self.vm = FailingVirtualMemory(CHUNK, TOTAL, use_native)
        self.base = self.vm.reserve(ROWS)
        self.made: list[int] = []
        self.at: dict[int, int] = {}
        self.written: set[int] = set()

    def address(self, row: int) -> int:
        return self.base + row * CHUNK

    def create(self, count: int) -> None:
        self.made += self.vm.create(count)

    def map(self, rows: list[int], pick: int) -> None:
        if not self.made:
            return
        addresses = [self.address(row) for row in rows]
        handles = [self.made[(pick + index) % len(self.made)] for index in range(len(rows))]
        try:
            self.vm.map(addresses, handles)
        except DriverError:
            return
        self.at.update(zip(addresses, handles, strict=True))

    def unmap(self, rows: list[int]) -> None:
        addresses = [self.address(row) for row in rows]
        for address in addresses[: self.vm.unmap(addresses)]:
            self.at.pop(address, None)  # what could not be undone is not known to be there

    def release(self, count: int) -> None:
        handles = self.made[:count]
        for handle in handles[: self.vm.release(handles)]:
            self.made.remove(handle)
            self.written.discard(handle)

    def submit(self, rows: list[int | None], targets: list[int | None]) -> None:
        """Chunks from rows to targets, some new, some from nowhere, some to nowhere, some onto others."""
        moves: list[Move] = []
        for row, target in zip(rows, targets, strict=False):
            to = None if target is None else self.address(target)
            source = None if row is None else self.address(row)
            if source in self.at and all(move.source != source for move in moves):
                moves.append(Move(self.at[source], source, to))
            else:
                moves.append(Move(None, None, to))
        for move, (handle, outcome) in zip(moves, self.vm.collect(self.vm.submit(moves)), strict=True):
            self.believe(move, handle, outcome)

    def believe(self, move: Move, handle: int | None, outcome: Outcome) -> None:
        if outcome is Outcome.NOT_MADE:
            assert (move.handle, handle) == (None, None)
            return
        assert handle is not None
        assert move.handle in (None, handle)
        if move.handle is None:
            self.made.append(handle)
        if outcome is not Outcome.STAYED and move.source is not None:
            del self.at[move.source]
        if outcome is Outcome.DONE and move.target is not None:
            self.at[move.target] = handle

    def look(self) -> None:
        """Every chunk shows its own content wherever it should be mapped; `close` would return all of it."""
        assert self.vm._places == set(self.at)
        assert self.vm._handles == set(self.made)
        for write in (True, False):
            for address, handle in self.at.items():
                view = self.vm.view(address, 1)
                if write and handle not in self.written:
                    view.fill_(1 + handle // CHUNK)
                    self.written.add(handle)
                assert {int(view[0]), int(view[-1])} == {1 + handle // CHUNK}

    def settle(self) -> None:
        """What is believed is all there is: the driver takes back exactly that, and has every chunk again."""
        self.vm.allow()
        self.vm.map([], [])  # clears what a refused undo left
        assert self.vm.unmap(list(self.at)) == len(self.at)
        assert self.vm.release(self.made) == len(self.made)
        assert len(self.vm.create(TOTAL + 1)) == TOTAL
        self.vm.close()


ROW = st.integers(0, ROWS - 1)
ROW_LIST = st.lists(ROW, min_size=1, max_size=4)
MAYBE_ROWS = st.lists(st.none() | ROW, min_size=1, max_size=6)
ACTIONS = st.one_of(
    st.tuples(st.just("create"), st.integers(1, 3)),
    st.tuples(st.just("map"), ROW_LIST, st.integers(0, 5)),
    st.tuples(st.just("unmap"), ROW_LIST),
    st.tuples(st.just("release"), st.integers(1, 3)),
    st.tuples(st.just("submit"), MAYBE_ROWS, MAYBE_ROWS),
    st.tuples(st.just("refuse"), st.sampled_from(CALLS), st.integers(0, 3), st.integers(1, 3)),
)


@both_mappers
@settings(max_examples=200, deadline=None)
@given(actions=st.lists(ACTIONS, max_size=25))
def test_every_end_is_told_as_it_is(use_native: bool, actions: list[tuple[Any, ...]]) -> None:
    believer = Believer(use_native)
    for name, *arguments in actions:
        getattr(believer.vm if name == "refuse" else believer, name)(*arguments)
        believer.look()
    believer.settle()


@both_mappers
@pytest.mark.parametrize(
    ("call", "moved", "mapped"),
    [
        ("create", [Outcome.DONE, Outcome.NOT_MADE], {1}),
        ("unmap", [Outcome.STAYED, Outcome.DONE], {0, 2}),
        ("map", [Outcome.UNMAPPED, Outcome.DONE], {2}),
        ("access", [Outcome.UNMAPPED, Outcome.DONE], {2}),
    ],
)
def test_each_call_refused_once(use_native: bool, call: str, moved: list[Outcome], mapped: set[int]) -> None:
    vm = FailingVirtualMemory(CHUNK, TOTAL, use_native)
    base = vm.reserve(4)
    (chunk,) = vm.create(1)
    vm.map([base], [chunk])
    vm.refuse(call)
    ends = vm.collect(vm.submit([Move(chunk, base, base + CHUNK), Move(None, None, base + 2 * CHUNK)]))
    assert [end.outcome for end in ends] == moved
    assert ends[0].handle == chunk
    assert vm.refusals.num_refused[call] == 1
    addresses = [base + row * CHUNK for row in range(4)]
    assert {row for row, address in enumerate(addresses) if vm.unmap([address])} == mapped
    vm.close()


@both_mappers
def test_a_map_that_could_not_be_undone_is_undone_later(use_native: bool) -> None:
    vm = FailingVirtualMemory(CHUNK, TOTAL, use_native)
    base = vm.reserve(2)
    one, two = vm.create(2)
    vm.refuse("access")
    vm.refuse("unmap")
    with pytest.raises(DriverError, match="mmap"):
        vm.map([base], [one])
    vm.map([base], [two])
    vm.refuse("access")
    vm.refuse("unmap")
    assert vm.collect(vm.submit([Move(one, None, base + CHUNK)])) == [Moved(one, Outcome.UNMAPPED)]
    assert vm.collect(vm.submit([Move(one, None, base + CHUNK)])) == [Moved(one, Outcome.DONE)]
    vm.close()


@both_mappers
def test_close_says_what_it_could_not_return(use_native: bool, caplog: pytest.LogCaptureFixture) -> None:
    vm = HostVirtualMemory(CHUNK, TOTAL, use_native)
    vm.reserve(1)
    (chunk,) = vm.create(1)
    vm._handles.add(chunk + CHUNK)
    vm.close()
    assert "1 of 2 chunks and places were not returned: fallocate failed" in caplog.text


@needs_native
def test_thousands_of_moves_beside_calls_at_once() -> None:
    """Chunks wander through 512 places, eight tickets in flight; others are made and released meanwhile."""
    rng = random.Random(1)
    vm = HostVirtualMemory(CHUNK, 192)
    base, other = vm.reserve(512), vm.reserve(32)
    chunks = vm.create(128)
    row_of = dict(zip(chunks, rng.sample(range(512), 128), strict=True))
    vm.map([base + row_of[chunk] * CHUNK for chunk in chunks], chunks)
    for chunk in chunks:
        vm.view(base + row_of[chunk] * CHUNK, 1).fill_(chunk // CHUNK)
    tickets: list[int] = []
    started = vm.num_calls
    for _ in range(200):
        free = list(set(range(512)) - set(row_of.values()))
        moving = rng.sample(chunks, 64)
        moves = []
        for chunk, row in zip(moving, rng.sample(free, 64), strict=True):
            moves.append(Move(chunk, base + row_of[chunk] * CHUNK, base + row * CHUNK))
            row_of[chunk] = row
        tickets.append(vm.submit(moves))
        mine = vm.create(16)
        places = [other + row * CHUNK for row in range(16)]
        vm.map(places, mine)
        assert int(vm.view(other, 16).max()) == 0
        vm.view(other, 16).fill_(255)
        assert (vm.unmap(places), vm.release(mine)) == (16, 16)
        if len(tickets) > 8:
            assert {moved.outcome for moved in vm.collect(tickets.pop(0))} == {Outcome.DONE}
    for ticket in tickets:
        vm.collect(ticket)
    for chunk, row in row_of.items():
        view = vm.view(base + row * CHUNK, 1)
        assert (int(view.min()), int(view.max())) == (chunk // CHUNK, chunk // CHUNK)
    assert vm.num_calls_beside == 200 * 64 * 2
    assert vm.num_calls - started == 200 * 16 * 4
    vm.close()


@pytest.fixture
def slow() -> Iterator[tuple[HostVirtualMemory, threading.Event]]:
    """A driver whose thread waits for the event before each map."""
    vm = HostVirtualMemory(CHUNK, TOTAL)
    gate = threading.Event()
    calls: Any = vm._mapper.calls  # type: ignore[attr-defined]
    kind = type(calls.map)
    real = kind(native.ctypes.cast(calls.map, native.ctypes.c_void_p).value)
    calls.map = kind(lambda *arguments: real(*arguments) if gate.wait(60) else 1)
    yield vm, gate
    gate.set()
    vm.close()


@needs_native
def test_a_ticket_is_done_when_its_last_move_is(slow: tuple[HostVirtualMemory, threading.Event]) -> None:
    vm, gate = slow
    base = vm.reserve(4)
    tickets = [vm.submit([Move(None, None, base + row * CHUNK)]) for row in range(3)]
    time.sleep(0.05)
    assert not any(map(vm.is_done, tickets))
    assert len(vm.create(2)) == 2, "calls at once do not wait for the thread"
    threading.Timer(0.05, gate.set).start()
    ((handle, outcome),) = vm.collect(tickets[2])
    assert outcome is Outcome.DONE
    assert vm.is_done(tickets[0]), "in their order"
    with pytest.raises(KeyError):
        vm.collect(tickets[2])


def mapping_threads() -> list[Path]:
    """This process's mapping threads, as Linux knows them."""
    return [
        path for path in Path("/proc/self/task").iterdir() if "ballonet-map" in (path / "comm").read_text()
    ]


@needs_native
def test_the_thread_comes_with_the_first_ticket_and_goes_with_its_driver() -> None:
    gc.collect()
    before = len(mapping_threads())
    vm = HostVirtualMemory(CHUNK, TOTAL)
    base = vm.reserve(1)
    assert len(mapping_threads()) == before
    vm.collect(vm.submit([Move(None, None, base)]))
    assert len(mapping_threads()) == before + 1
    status = (mapping_threads()[-1] / "status").read_text()
    blocked = int(status.split("SigBlk:")[1].split()[0], 16)
    assert blocked & 1 << signal.SIGINT - 1, "signals are the interpreter's"
    del vm
    gc.collect()
    assert len(mapping_threads()) == before


@needs_native
def test_without_a_thread_moves_are_made_at_once(caplog: pytest.LogCaptureFixture) -> None:
    vm = HostVirtualMemory(CHUNK, TOTAL)
    base = vm.reserve(1)
    vm._mapper.close()  # as at the interpreter's exit
    ticket = vm.submit([Move(None, None, base)])
    assert vm.is_done(ticket)
    assert vm.collect(ticket)[0].outcome is Outcome.DONE
    assert (vm.num_calls, vm.num_calls_beside) == (2, 0)
    assert "no mapping thread" in caplog.text
    vm.close()


BUSY = """
import gc, os, sys, threading
from engine.memory.host_vmm import HostVirtualMemory
from engine.memory.vmm import Move
vm = HostVirtualMemory(4096, 512)
base = vm.reserve(512)
for row in range(512):
    vm.submit([Move(None, None, base + row * 4096)])
"""


ON = "def on():\n    while True: vm.collect(vm.submit([]))\nthreading.Thread(target=on, daemon=True).start()"
FORK = "child = os.fork()\nif not child: del vm; sys.exit(0)\nassert os.waitpid(child, 0)[1] == 0\nvm.close()"


@needs_native
@pytest.mark.parametrize(
    "ending",
    [
        "",
        "sys.exit(0)",
        "vm.close()",
        "del vm",
        "me = [vm]; me.append(me); del vm, me; gc.collect()",
        ON,
        FORK,
    ],
    ids=["end", "exit", "close", "deleted", "in a cycle", "a daemon goes on", "fork"],
)
def test_a_process_ends_while_the_thread_is_busy(ending: str) -> None:
    command = [sys.executable, "-c", BUSY + ending]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    assert "Traceback" not in result.stderr
