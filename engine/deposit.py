"""Tokens that are ahead of their clients (OrbitFlow's token deposit).

While sequences take turns on the device, each generates faster than its client was promised, and then not
at all. Handed out at the promised pace, its tokens reach the client evenly: what was generated ahead is
what it lives on while others have their turn. With nobody parked nothing is held back.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.messages import TokenDelta


@dataclass(slots=True)
class _Account:
    """One request's tokens that are not handed out: when each is due, in order."""

    due_s: deque[float] = field(default_factory=deque)
    deltas: deque[TokenDelta] = field(default_factory=deque)


class Deposit:
    """Holds tokens back until they are due. Knows requests by their id alone."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self._next: list[tuple[float, str]] = []

    @property
    def num_tokens(self) -> int:
        """Tokens held back."""
        return sum(len(account.deltas) for account in self._accounts.values())

    def pass_on(
        self, entries: Iterable[tuple[TokenDelta, float]], now_s: float, holds_back: bool
    ) -> list[TokenDelta]:
        """What goes out now of new deltas, each with the time at which its client is promised it, and of
        those that were held back. The end of a request takes all of its tokens along.

        Args:
            holds_back: whether sequences take turns; if not, everything goes out.
        """
        if not holds_back and not self._accounts:
            return [delta for delta, _ in entries]
        passed = [] if holds_back else self._take_all()
        for delta, due_s in entries:
            held = delta.request_id in self._accounts
            if holds_back and delta.finish_reason is None and (held or due_s > now_s):
                self._put(delta, due_s)
            else:
                rest = self._close(delta.request_id)
                passed.append(delta if rest is None else rest.then(delta))
        return passed + self._take_due(now_s)

    def take(self, request_id: str) -> list[tuple[TokenDelta, float]]:
        """A request's tokens that are not handed out, and when each is due: it takes them elsewhere."""
        account = self._accounts.get(request_id)
        entries = list(zip(account.deltas, account.due_s, strict=True)) if account is not None else []
        self._close(request_id)
        return entries

    def _put(self, delta: TokenDelta, due_s: float) -> None:
        account = self._accounts.setdefault(delta.request_id, _Account())
        if not account.deltas:
            heapq.heappush(self._next, (due_s, delta.request_id))
        account.due_s.append(due_s)
        account.deltas.append(delta)

    def _take_due(self, now_s: float) -> list[TokenDelta]:
        """What is due by now, as one delta for each request."""
        taken = []
        while self._next and self._next[0][0] <= now_s:
            _, request_id = heapq.heappop(self._next)
            account = self._accounts.get(request_id)
            if account is None:
                continue  # it has ended since
            account.due_s.popleft()
            delta = account.deltas.popleft()
            while account.due_s and account.due_s[0] <= now_s:
                account.due_s.popleft()
                delta = delta.then(account.deltas.popleft())
            taken.append(delta)
            if account.deltas:
                heapq.heappush(self._next, (account.due_s[0], request_id))
            else:
                del self._accounts[request_id]
        return taken

    def _close(self, request_id: str) -> TokenDelta | None:
        """The rest of a request's tokens, all at once."""
        account = self._accounts.pop(request_id, None)
        if account is None:
            return None
        self._next = [one for one in self._next if one[1] != request_id]
        heapq.heapify(self._next)
        rest = account.deltas.popleft()
        for delta in account.deltas:
            rest = rest.then(delta)
        return rest

    def _take_all(self) -> list[TokenDelta]:
        rest = [self._close(request_id) for request_id in list(self._accounts)]
        self._next.clear()
        return [delta for delta in rest if delta is not None]
