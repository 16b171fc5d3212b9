"""Where deltas leave the engine: on time, or held back until their clients expect them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine.deposit import Deposit
from engine.messages import TokenDelta

_LONGEST_GAP_S = 5.0  # between finished requests; a longer one was idle time, not load

Publish = Callable[[Sequence[TokenDelta]], None]
Entry = tuple[TokenDelta, float]  # and the time at which its client is promised it


class Outlet:
    """Publishes deltas, and watches how fast requests end.

    Args:
        publish: receives every delta, in the engine's thread; must be quick.
        clock: seconds that never go back.

    Attributes:
        request_s: recent seconds between two finished requests, smoothed.
    """

    def __init__(self, publish: Publish, clock: Callable[[], float]) -> None:
        self._publish = publish
        self._clock = clock
        self._deposit = Deposit()
        self._last_finish_s = clock()
        self.request_s = 1.0

    @property
    def num_deposited(self) -> int:
        """Tokens held back."""
        return self._deposit.num_tokens

    def put(self, entries: Sequence[Entry], holds_back: bool) -> None:
        """Hand out what is due of these and earlier ones; all of it unless `holds_back`."""
        now_s = self._clock()
        if any(delta.finish_reason is not None for delta, _ in entries):
            gap = min(now_s - self._last_finish_s, _LONGEST_GAP_S)
            self.request_s += 0.1 * (gap - self.request_s)
            self._last_finish_s = now_s
        deltas = self._deposit.pass_on(entries, now_s, holds_back)
        if deltas:
            self._publish(deltas)

    def take(self, request_id: str) -> list[Entry]:
        """What is held back of a request, which goes elsewhere with it."""
        return self._deposit.take(request_id)

    def end(self, deltas: Sequence[TokenDelta]) -> None:
        """The engine has stopped: everything that is held back goes out, and then these."""
        self.put([(delta, 0.0) for delta in deltas], holds_back=False)
