"""How long a step takes, learnt from those that have run. Nothing is right or wrong by what it says."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

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
_SCALE = np.array([1.0, 1e-3, 1e-2, 1e-5, 1e-7])


class StepTimes:
    """A line through the times of recent steps, by recursive least squares.

    Its terms are those of a step: the weights are read once, then each token costs matrix products, each
    decode its context, each prompt token the tokens before it (LayerKV Eq. 3 with fitted factors).
    """

    def __init__(self) -> None:
        self._weights = np.zeros(len(_SCALE))
        self._covariance = np.eye(len(_SCALE)) * _PRIOR
        self._count = 0

    @property
    def is_fitted(self) -> bool:
        """Whether enough steps were seen to predict one."""
        return self._count >= _FIRST

    def observe(self, work: StepWork, seconds: float) -> None:
        """A step of that size took so long."""
        x = _features(work)
        gain = self._covariance @ x / (_FORGETTING + x @ self._covariance @ x)
        self._weights = self._weights + gain * (seconds - x @ self._weights)
        covariance = (self._covariance - np.outer(gain, x @ self._covariance)) / _FORGETTING
        if np.trace(covariance) < _MOST:
            self._covariance = covariance
        self._count += 1

    def predict(self, work: StepWork) -> float:
        """Seconds that a step of that size takes, at least 0."""
        return max(0.0, float(_features(work) @ self._weights))

    def per_prompt_token(self, context: float) -> float:
        """Seconds that one more prompt token costs behind so many others, at least 0."""
        return max(0.0, float(self._weights[1] * _SCALE[1] + self._weights[4] * _SCALE[4] * context))


def _features(work: StepWork) -> npt.NDArray[np.float64]:
    features: npt.NDArray[np.float64] = np.array([1.0, *work]) * _SCALE
    return features
