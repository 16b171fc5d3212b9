"""How much may be copied to the balloon ahead of need, beside steps that must not feel it."""

from __future__ import annotations

_MIB = 1 << 20
# 64 MiB are 1.3 ms of the link (H100): so long an urgent copy may wait beside a step of `_STEP_S`, and in
# proportion beside longer ones. That is a tenth of the link.
_MOST, _LEAST = 64 * _MIB, 2 * _MIB
_STEP_S = 0.0125
_BEARABLE = 1.03  # of a step's time
_SMOOTHING = 0.05


class Governor:
    """Bytes that may be under way at a time: fewer when steps beside copies take longer than others.

    Times are compared to what was predicted of each step, so that it does not matter which steps they are.
    """

    def __init__(self) -> None:
        self._alone = self._beside = 1.0
        self._bytes = float(_MOST)

    def num_bytes(self, step_s: float) -> int:
        """That may be under way at once, beside steps that take so many seconds."""
        return int(self._bytes * max(1.0, step_s / _STEP_S))

    def step(self, slowness: float, was_copying: bool) -> None:
        """A step took `slowness` times what was predicted of it, beside copies or alone."""
        slowness = min(2.0, max(0.5, slowness))  # a hiccup of the host says nothing
        if not was_copying:
            self._alone += _SMOOTHING * (slowness - self._alone)
            return
        self._beside += _SMOOTHING * (slowness - self._beside)
        if self._beside > _BEARABLE * self._alone:
            self._bytes = max(_LEAST, self._bytes * 0.9)
        else:
            self._bytes = min(_MOST, self._bytes * 1.02)
