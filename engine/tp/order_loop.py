"""How a rank that follows takes orders: one after another, with a look at what ends by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engine.errors import EngineDeadError
from engine.tp.followers import Kind
from engine.tp.wire import Link, Message, pack

Order = Callable[..., Any]

_ANSWERED = {"map"}  # even by None; of the others, those that return something are
_LOOK_S = 0.001


class OrderLoop:
    """Carries out what comes over a link.

    Attributes:
        orders: what each is called, and what does it.

    Args:
        link: to the first rank.
        is_idle, report: whether something that ends by itself is under way, and what tells of its end.
        spin_s: how long to wait for the next order without going to sleep.
    """

    def __init__(
        self,
        link: Link,
        orders: Mapping[str, Order],
        is_idle: Callable[[], bool],
        report: Callable[[], None],
        spin_s: float = 0.0,
    ) -> None:
        self._spin_s = spin_s
        self._link = link
        self.orders = dict(orders)
        self._is_idle = is_idle
        self._report = report

    def serve(self) -> None:
        """Do what is ordered until the first rank is gone."""
        while True:
            try:
                message = self._next()
            except EngineDeadError:
                return
            self._obey(message)

    def until(self, name: str) -> None:
        """Do what is ordered up to that word."""
        while (message := self._next())[0] != name:
            self._obey(message)

    def _next(self) -> Message:
        if self._spin_s:
            self._link.spin(_LOOK_S if not self._is_idle() else self._spin_s)
        while not self._is_idle():
            self._report()
            if self._link.has_mail(_LOOK_S):
                break
        return self._link.receive()

    def _obey(self, message: Message) -> None:
        name, *arguments = message
        value = self.orders[name](*arguments)
        if value is not None or name in _ANSWERED:
            self._link.send(pack((Kind.ANSWER, value)))
        if not self._is_idle():
            self._report()
