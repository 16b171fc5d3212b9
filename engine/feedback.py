"""What breaches of promises tell the scheduler: to let more prompts in, or fewer (eLLM section 4.3)."""

from __future__ import annotations

from collections import deque

from engine.config import SchedulerConfig


class Feedback:
    """A share, from 1 down to a floor, of the balloon that new prompts may send others to, and of the largest
    step that their tokens may take.

    Next tokens that come too late halve it, so that fewer prompts are let in; first tokens that come too
    late, while next tokens are in time, double it. What is in the balloon stays there.

    Args:
        config: `feedback_window` steps are looked at, `feedback_breaches` of them change the share by
            `feedback_factor`, and not again for `feedback_dwell_steps`.
    """

    _FLOOR = 1 / 16

    def __init__(self, config: SchedulerConfig) -> None:
        self._breaches, self._factor = config.feedback_breaches, config.feedback_factor
        self._dwell = config.feedback_dwell_steps
        self._next: deque[bool] = deque(maxlen=config.feedback_window)
        self._first: deque[bool] = deque(maxlen=config.feedback_window)
        self._rest = 0
        self.share = 1.0

    def step(self, next_token_late: bool, first_token_late: bool) -> str | None:
        """A step has been taken, after which promises were kept or not; what was decided, if anything."""
        self._next.append(next_token_late)
        self._first.append(first_token_late)
        self._rest = max(0, self._rest - 1)
        if self._rest:
            return None
        if sum(self._next) >= self._breaches:
            return self._change(max(self._FLOOR, self.share / self._factor), "deflate")
        if sum(self._first) >= self._breaches and not any(self._next):
            return self._change(min(1.0, self.share * self._factor), "inflate")
        return None

    def _change(self, share: float, decision: str) -> str | None:
        if share == self.share:
            return None
        self.share, self._rest = share, self._dwell
        self._next.clear()
        self._first.clear()
        return decision
