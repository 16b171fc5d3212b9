"""How long a new request would wait for its first token, from how fast prompts have been computed."""

from __future__ import annotations

_WINDOW_S = 1.0
_SMOOTHING = 0.3  # of a window's rate


class QueueTime:
    """Counts the prompt tokens computed while some were waiting: what holds prompts up, memory or a full step
    or decodes, shows in the rate.
    """

    def __init__(self) -> None:
        self._rate: float | None = None
        self._busy_s = 0.0
        self._tokens = 0
        self._last_s: float | None = None
        self._was_busy = False
        self._backlog = 0

    def step(self, now_s: float, tokens: int, backlog: int) -> None:
        """A step is about to compute so many prompt tokens, and leaves so many for later."""
        if self._last_s is not None and self._was_busy:
            self._busy_s += now_s - self._last_s
        self._last_s, self._was_busy = now_s, tokens > 0 or backlog > 0
        self._tokens += tokens
        self._backlog = backlog
        if self._busy_s >= _WINDOW_S:
            rate = self._tokens / self._busy_s
            self._rate = rate if self._rate is None else self._rate + _SMOOTHING * (rate - self._rate)
            self._busy_s, self._tokens = 0.0, 0

    def first_token_s(self, tokens: int) -> float:
        """Seconds until a request of so many tokens would have its first, if it came now; 0 while nothing is
        known. For any thread.
        """
        return (self._backlog + tokens) / self._rate if self._rate else 0.0
