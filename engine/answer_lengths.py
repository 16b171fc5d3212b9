"""How long answers become, learnt from those that have ended. Nothing is right or wrong by what it says."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from itertools import accumulate
from typing import NamedTuple

_REMEMBERED = 64  # answers
_ENOUGH = 8  # of them that were longer; with fewer, half of what may be generated is expected


class _Seen(NamedTuple):
    num_tokens: int
    stopped: bool


class AnswerLengths:
    """Forecast of what a sequence generates yet: LayerKV's bound on prompts (section 3.1, Eq. 1) needs one.

    An answer that ended because no more tokens were allowed would have gone on: it says that answers are at
    least so long (a right-censored observation). So the tokens that longer answers had beyond this one's
    are shared among those of them that stopped by themselves.
    """

    def __init__(self) -> None:
        self._seen: deque[_Seen] = deque(maxlen=_REMEMBERED)
        self._lengths: list[int] = []  # rising
        self._tokens: list[int] = [0]  # of the longest, of the two longest, ..
        self._stops: list[int] = [0]  # those of them that stopped

    def ended(self, num_tokens: int, stopped: bool) -> None:
        """An answer has ended, by itself or because it was to be no longer."""
        self._seen.append(_Seen(num_tokens, stopped))
        rising = sorted(self._seen)
        self._lengths = [one.num_tokens for one in rising]
        self._tokens = list(accumulate(self._lengths[::-1], initial=0))
        self._stops = list(accumulate([one.stopped for one in rising[::-1]], initial=0))

    def num_left(self, num_generated: int, most: int) -> float:
        """Tokens that an answer is expected to gain yet.

        Args:
            num_generated: that it has.
            most: that it may gain.
        """
        longer = len(self._lengths) - bisect_right(self._lengths, num_generated)
        if longer < _ENOUGH:
            return most / 2
        if not self._stops[longer]:
            return most
        return min(most, (self._tokens[longer] - longer * num_generated) / self._stops[longer])
