"""Tokens that are ahead of their clients (OrbitFlow's token deposit).

While sequences take turns on the device, each generates faster than its client was promised, and then not
at all. Handed out at the promised pace, its tokens reach the client evenly: what was generated ahead is
what it lives on while others have their turn. With nobody parked nothing is held back.
"""

from __future__ import annotations

import heapq
from collections import deque
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

    @property
    def next_due_s(self) -> float | None:
        """When the next token is due."""
        return self._next[0][0] if self._next else None

    def put(self, delta: TokenDelta, due_s: float) -> None:
        """Hold one token of a request back until then; later ones are never handed out before it."""
        account = self._accounts.setdefault(delta.request_id, _Account())
        if not account.deltas:
            heapq.heappush(self._next, (due_s, delta.request_id))
        account.due_s.append(due_s)
        account.deltas.append(delta)

    def holds(self, request_id: str) -> bool:
        """Whether a request has tokens here."""
        return request_id in self._accounts

    def take_due(self, now_s: float) -> list[TokenDelta]:
        """What is due by now, as one delta for each request."""
        taken = []
        while self._next and self._next[0][0] <= now_s:
            _, request_id = heapq.heappop(self._next)
            account = self._accounts.get(request_id)
            if account is None:
                continue
            delta = account.deltas.popleft()
            account.due_s.popleft()
            while account.due_s and account.due_s[0] <= now_s:
                delta = delta.then(account.deltas.popleft())
                account.due_s.popleft()
            taken.append(delta)
            if account.deltas:
                heapq.heappush(self._next, (account.due_s[0], request_id))
            else:
                del self._accounts[request_id]
        return taken

    def close(self, request_id: str) -> TokenDelta | None:
        """The rest of a request's tokens, all at once."""
        account = self._accounts.pop(request_id, None)
        if account is None:
            return None
        rest = account.deltas.popleft()
        for delta in account.deltas:
            rest = rest.then(delta)
        return rest

    def take_all(self) -> list[TokenDelta]:
        """Everything: nobody has to wait for a turn any more."""
        rest = [self.close(request_id) for request_id in list(self._accounts)]
        self._next.clear()
        return [delta for delta in rest if delta is not None]
