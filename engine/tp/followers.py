"""The other ranks as the first one sees them: told in order what to do, asked where it matters, watched.

What is sent is done in the order it was sent. Most of it needs no answer. Where the first rank has to know,
it asks, and does its own share of the work before it reads the answers. What ends by itself on a rank, chunks
that were moved and KV that was copied, is reported by it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from enum import Enum
from typing import Any

from engine.errors import BallonetError, DriverError, EngineDeadError
from engine.memory.vmm import Outcome
from engine.tp.wire import Link, Message, pack

ANSWER_S = 120.0  # the longest of what is asked: a slab of the balloon, pinned on a busy host

Outcomes = list[Outcome] | None  # None: all of them DONE


class Kind(Enum):
    """What a rank sends."""

    ANSWER = "answer"  # value
    MOVED = "moved"  # ticket, Outcomes
    COPIED = "copied"  # ticket, call and reason of a refusal or None
    FAILED = "failed"  # the error that ended it


class Followers:
    """All ranks but the first. Used by the engine's thread; `send` by any.

    Args:
        links: one a rank, in their order.

    Attributes:
        num_finished: runs that the first rank knows to have finished on the devices.
    """

    def __init__(self, links: Sequence[Link]) -> None:
        self._links = list(links)
        self._lock = threading.Lock()
        self._answers: list[list[Any]] = [[] for _ in links]
        self._moved: list[dict[int, Outcomes]] = [{} for _ in links]
        self._copied: list[dict[int, tuple[str, str] | None]] = [{} for _ in links]
        self._last_ticket = 0
        self.num_finished = 0
        # They end when nobody drives them any more.
        self.close = weakref.finalize(self, _hang_up, self._links)

    def __len__(self) -> int:
        return len(self._links)

    def new_ticket(self) -> int:
        """A number for something that ends by itself."""
        self._last_ticket += 1
        return self._last_ticket

    def send(self, *message: object) -> None:
        """Have every rank do something.

        Raises:
            EngineDeadError: one of them is gone.
        """
        packed = pack(message)
        with self._lock:
            for link in self._links:
                link.send(packed)

    def send_to(self, which: Sequence[int], *message: object) -> None:
        """The same for some of them, by their index."""
        packed = pack(message)
        with self._lock:
            for index in which:
                self._links[index].send(packed)

    def answers(self, which: Sequence[int] | None = None, timeout_s: float = ANSWER_S) -> list[Any]:
        """One answer from each rank, or from each of `which`.

        Raises:
            EngineDeadError: a rank is gone, or silent for too long.
        """
        found = []
        for index in range(len(self)) if which is None else which:
            while not self._answers[index]:
                self._take(index, self._links[index].receive(timeout_s))
            found.append(self._answers[index].pop(0))
        return found

    def ask(self, *message: object, timeout_s: float = ANSWER_S) -> list[Any]:
        """`send`, and the answers."""
        self.send(*message)
        return self.answers(timeout_s=timeout_s)

    def listen(self) -> None:
        """Take in what ranks have reported. Never waits."""
        for index, link in enumerate(self._links):
            while link.has_mail():
                self._take(index, link.receive())

    def have_moved(self, ticket: int) -> bool:
        """Whether every rank has reported a ticket of moves."""
        return all(ticket in moved for moved in self._moved)

    def moved(self, ticket: int) -> list[Outcomes]:
        """How they ended on each rank; waits for it. Once for each ticket."""
        return [self._reported(self._moved, index, ticket) for index in range(len(self))]

    def have_copied(self, ticket: int) -> bool:
        """Whether every rank has reported a ticket of copies."""
        return all(ticket in copied for copied in self._copied)

    def copied(self, ticket: int) -> DriverError | None:
        """The first refusal of a ticket of copies on any rank; waits until it has ended. Once for each."""
        refused = [self._reported(self._copied, index, ticket) for index in range(len(self))]
        return next((DriverError(*one) for one in refused if one is not None), None)

    def _reported(self, reports: list[dict[int, Any]], index: int, ticket: int) -> Any:
        while ticket not in reports[index]:
            self._take(index, self._links[index].receive(ANSWER_S))
        return reports[index].pop(ticket)

    def _take(self, index: int, message: Message) -> None:
        kind, *content = message
        if kind is Kind.ANSWER:
            self._answers[index].append(content[0])
        elif kind is Kind.MOVED:
            self._moved[index][content[0]] = content[1]
        elif kind is Kind.COPIED:
            self._copied[index][content[0]] = content[1]
        else:
            error = content[0]
            if isinstance(error, BallonetError):
                raise error
            raise EngineDeadError(f"rank {index + 1} ended: {error}")


def _hang_up(links: list[Link]) -> None:
    for link in links:
        link.close()
