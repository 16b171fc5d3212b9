"""What a rank that follows does with its memory: the first rank's calls, on its own driver.

Addresses and handles come as the first rank's; those here are looked up. The driver's verbs mean what they
mean in `engine.memory.vmm`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from engine.errors import DriverError
from engine.memory.copies import Copies, Direction, Ticket
from engine.memory.vmm import Move, Moved, Outcome, VirtualMemory
from engine.tp.addresses import AddressMap
from engine.tp.followers import Kind, Outcomes
from engine.tp.settling import NO_HANDLE, bring

Refusal = tuple[str, str]  # call and reason of a DriverError
Report = Callable[..., None]  # Kind, then its content


class MemoryExecutor:
    """One rank's chunks and copies, as the first rank orders them.

    Args:
        vm, copies: of this rank.
        report: tells the first rank how something ended.
        wait_for_run: returns when so many runs have finished on the device: nothing is unmapped while one of
            them may read it. The first rank's device has finished them; this one may be a moment behind.
    """

    def __init__(
        self,
        vm: VirtualMemory,
        copies: Copies | None,
        report: Report,
        wait_for_run: Callable[[int], None],
    ) -> None:
        self.addresses = AddressMap()
        self._vm = vm
        self._copies = copies
        self._report = report
        self._wait_for_run = wait_for_run
        self._handles: dict[int, int] = {}
        self._moving: deque[tuple[int, int, list[Move]]] = deque()  # ticket, own ticket, moves
        self._ended: dict[int, tuple[list[Move], list[Moved]]] = {}
        self._tickets: dict[int, Ticket] = {}  # of copies, until they are told to go
        self._copying: dict[Direction, deque[int]] = {way: deque() for way in Direction}

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to report."""
        return not self._moving and not any(self._copying.values())

    @property
    def orders(self) -> dict[str, Callable[..., object]]:
        """By the names that `engine.tp.mirrors` gives them."""
        verbs = self.reserve, self.create, self.map, self.unmap, self.release, self.move, self.moved
        return {verb.__name__: verb for verb in (*verbs, self.copy, self.hold)}

    def reserve(self, address: int, num_chunks: int) -> None:
        ours = self._vm.reserve(num_chunks)
        self.addresses.add(address, num_chunks * self._vm.chunk_bytes, ours)

    def create(self, handles: Sequence[int]) -> int:
        made = self._vm.create(len(handles))
        self._handles.update(zip(handles, made, strict=False))
        return len(made)

    def map(self, addresses: bytes, handles: bytes) -> Refusal | None:
        try:
            self._vm.map(self.addresses.translate(addresses), [self._handles[one] for one in _words(handles)])
        except DriverError as error:
            return error.call, error.reason
        return None

    def unmap(self, addresses: bytes, num_finished: int) -> int:
        self._wait_for_run(num_finished)
        return self._vm.unmap(self.addresses.translate(addresses))

    def release(self, handles: bytes) -> int:
        """Those that were never made here count as released."""
        wanted = _words(handles)
        known = [one for one in wanted if one in self._handles]
        done = self._vm.release([self._handles[one] for one in known])
        for one in known[:done]:
            del self._handles[one]
        return len(wanted) if done == len(known) else wanted.index(known[done])

    def move(self, ticket: int, handles: bytes, sources: bytes, targets: bytes, num_finished: int) -> None:
        self._wait_for_run(num_finished)
        known = [None if one == NO_HANDLE else self._handles[one] for one in _words(handles)]
        places = [self.addresses.translate(one) for one in (sources, targets)]
        moves = [
            Move(handle, source or None, target or None)
            for handle, source, target in zip(known, *places, strict=True)
        ]
        self._moving.append((ticket, self._vm.submit(moves), moves))

    def moved(self, ticket: int, handles: bytes, common: list[Outcome] | None) -> bool | None:
        """The first rank has heard how a ticket ended everywhere.

        Args:
            handles: the first rank's, of every chunk.
            common: how each move is to have ended on all ranks; None if it did. Whether it has, is answered.
        """
        moves, ended = self._ended.pop(ticket)
        settled: list[Moved | None] = list(ended)
        if common is not None:
            settled = [
                bring(self._vm, move, moved, outcome)
                for move, moved, outcome in zip(moves, ended, common, strict=True)
            ]
        for theirs, moved_here in zip(_words(handles), settled, strict=True):
            if moved_here is not None and moved_here.handle is not None:
                self._handles[theirs] = moved_here.handle
        return None if common is None else None not in settled

    def copy(
        self, ticket: int, direction: Direction, targets: bytes, sources: bytes, after_steps: bool
    ) -> None:
        assert self._copies is not None
        places = self.addresses.translate(targets), self.addresses.translate(sources)
        self._tickets[ticket] = self._copies.submit(direction, *places, after_steps)
        self._copying[direction].append(ticket)

    def hold(self, ticket: int) -> None:
        """Of copies that have been reported nobody needs to wait."""
        if self._copies is not None and ticket in self._tickets:
            self._copies.hold_steps(self._tickets[ticket])

    def report(self) -> None:
        """Tell the first rank what has ended, in the order it was begun."""
        while self._moving and self._vm.is_done(self._moving[0][1]):
            ticket, own, moves = self._moving.popleft()
            ended = self._vm.collect(own)
            self._ended[ticket] = moves, ended
            outcomes: Outcomes = [moved.outcome for moved in ended]
            if all(outcome is Outcome.DONE for outcome in outcomes or ()):
                outcomes = None
            self._report(Kind.MOVED, ticket, outcomes)
        for queue in self._copying.values():
            while queue and self._tickets[queue[0]].is_done:
                ticket = queue.popleft()
                self._report(Kind.COPIED, ticket, _refusal(self._tickets.pop(ticket)))


def _refusal(ticket: Ticket) -> Refusal | None:
    try:
        ticket.wait()
    except DriverError as error:
        return error.call, error.reason
    return None


def _words(packed: bytes) -> list[int]:
    words: list[int] = np.frombuffer(packed, np.uint64).tolist()
    return words
