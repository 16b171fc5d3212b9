"""How long a step takes, learnt from those that have run. Nothing is right or wrong by what it says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from engine.messages import StepPlan

_FORGETTING = 0.995  # of an observation's weight, with each later one: 200 steps count
_FIRST = 8  # observations before which nothing is predicted
_PRIOR = 1e3  # variance of the weights before the first observation
_MOST = 1e6  # of the same later: steps that are all alike say nothing about others


class StepWork(NamedTuple):
    """What a step computes, as far as its time depends on it.

    Attributes:
        prompt_tokens: of pieces of prompts.
        decodes: sequences that gain a token.
        context: tokens that these read.
        pairs: of prompt tokens with tokens before them.
    """

    prompt_tokens: int = 0
    decodes: int = 0
    context: int = 0
    pairs: float = 0.0

    @staticmethod
    def of(plan: StepPlan) -> StepWork:
        """The work of a plan."""
        decodes, prompts = plan.pieces[: plan.num_decodes], plan.pieces[plan.num_decodes :]
        sizes = [len(piece.token_ids) for piece in prompts]
        return StepWork(
            sum(sizes),
            len(decodes),
            sum([piece.start for piece in decodes]),
            sum(size * (piece.start + size / 2) for size, piece in zip(sizes, prompts, strict=True)),
        )


# Large numbers and small ones are learnt equally fast if all are about one.
_SCALE = (1.0, 1e-3, 1e-2, 1e-5, 1e-7)


class StepTimes:
    """A line through the times of recent steps, by recursive least squares.

    Its terms are those of a step: the weights are read once, then each token costs matrix products, each
    decode its context, each prompt token the tokens before it (LayerKV Eq. 3 with fitted factors). Lists,
    since arrays of five numbers cost more: 39 instead of 22 us an observation, 6 instead of 1.5 a prediction.
    """

    def __init__(self) -> None:
        size = range(len(_SCALE))
        self._weights = [0.0 for _ in size]
        self._covariance = [[_PRIOR * (row == column) for column in size] for row in size]
        self._count = 0

    @property
    def is_fitted(self) -> bool:
        """Whether enough steps were seen to predict one."""
        return self._count >= _FIRST

    def observe(self, work: StepWork, seconds: float) -> None:
        """A step of that size took so long."""
        x = _features(work)
        spread = [_dot(row, x) for row in self._covariance]  # symmetric: of its columns as well
        scale = 1.0 / (_FORGETTING + _dot(x, spread))
        error = (seconds - _dot(x, self._weights)) * scale
        self._weights = [weight + one * error for weight, one in zip(self._weights, spread, strict=True)]
        # `one * other` is the same number both ways: the matrix stays symmetric to the last bit. What is not
        # grows by the forgetting where no step looks: after 7,000 steps a token was to take 1e23 s.
        covariance = [
            [(entry - one * other * scale) / _FORGETTING for entry, other in zip(row, spread, strict=True)]
            for row, one in zip(self._covariance, spread, strict=True)
        ]
        if sum([row[at] for at, row in enumerate(covariance)]) < _MOST:
            self._covariance = covariance
        self._count += 1

    def predict(self, work: StepWork) -> float:
        """Seconds that a step of that size takes, at least 0."""
        return max(0.0, _dot(_features(work), self._weights))

    def per_prompt_token(self, context: float) -> float:
        """Seconds that one more prompt token costs behind so many others, at least 0."""
        return max(0.0, self._weights[1] * _SCALE[1] + self._weights[4] * _SCALE[4] * context)


def _features(work: StepWork) -> tuple[float, float, float, float, float]:
    prompt_tokens, decodes, context, pairs = work
    _, per_token, per_decode, per_context, per_pair = _SCALE
    return 1.0, prompt_tokens * per_token, decodes * per_decode, context * per_context, pairs * per_pair


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    a, b, c, d, e = left
    v, w, x, y, z = right
    return a * v + b * w + c * x + d * y + e * z
