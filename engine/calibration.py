"""How long a device takes for a step, a copy and a start: what virtual time is made of.

Two ways to say how long a step takes: rates, from what is known of a device and a model's shape, or points
that were measured with an engine (`engine.measuring`), between which lines are drawn. Nothing here is used to
serve; what a serving engine expects of its steps it learns itself (`engine.step_times`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engine.config import Device
from engine.errors import ConfigError
from engine.step_times import StepWork


class StepSeconds(Protocol):
    """Says how long a step takes."""

    def step_s(self, work: StepWork) -> float:
        """Seconds."""


@dataclass(frozen=True, slots=True)
class StepRates:
    """A device, and a model's shape on it.

    Attributes:
        read_s: a step's least time: the weights are read once, and kernels are launched.
        token_s: for each token of a step, in matrix products.
        kv_read_s: for each token of a decode's context.
        pair_s: for each pair of a prompt's token and one before it.
    """

    read_s: float
    token_s: float
    kv_read_s: float
    pair_s: float

    def step_s(self, work: StepWork) -> float:
        """Seconds a step takes."""
        products = max(self.read_s, (work.prompt_tokens + work.decodes) * self.token_s)
        return products + (work.context + work.decodes) * self.kv_read_s + work.pairs * self.pair_s


@dataclass(frozen=True, slots=True)
class PrefillPoint:
    """A step that computed one piece of a prompt, and nothing else.

    Attributes:
        tokens: of the piece.
        context: tokens before it, whose KV was there.
        seconds: median of several.
    """

    tokens: int
    context: int
    seconds: float


@dataclass(frozen=True, slots=True)
class DecodePoint:
    """A step of decodes alone.

    Attributes:
        batch: sequences.
        context: tokens of each, on average.
        seconds: median of several.
    """

    batch: int
    context: int
    seconds: float


class StepPoints:
    """Lines between measured points.

    A step is matrix products, by the number of its tokens; and attention, by pairs of a prompt's tokens with
    those before them, and by the contexts that decodes read. Points at different contexts tell attention's
    part, the rest is products. Beyond the largest point its line goes on; below the smallest nothing is
    cheaper. A step with prompts and decodes has their products together, and the attention of both.

    Raises:
        ConfigError: no point of one kind.
    """

    def __init__(self, prefill: Sequence[PrefillPoint], decode: Sequence[DecodePoint]) -> None:
        if not prefill or not decode:
            raise ConfigError("a calibration needs at least one point of `prefill` and one of `decode`")
        self.prefill, self.decode = tuple(prefill), tuple(decode)
        pairs = [(point, _pairs(point)) for point in prefill]
        self.pair_s = _slope([(p.tokens, x, p.seconds) for p, x in pairs])
        self.context_s = _slope([(p.batch, p.batch * p.context, p.seconds) for p in decode])
        self._prompt = _line([(p.tokens, p.seconds - self.pair_s * x) for p, x in pairs])
        self._decode = _line([(p.batch, p.seconds - self.context_s * p.batch * p.context) for p in decode])

    def step_s(self, work: StepWork) -> float:
        """Seconds a step takes."""
        products = _at(self._decode, work.decodes) if work.decodes else 0.0
        if work.prompt_tokens:
            products = max(products, _at(self._prompt, work.prompt_tokens + work.decodes))
        return products + self.context_s * work.context + self.pair_s * work.pairs


def _pairs(point: PrefillPoint) -> float:
    return point.tokens * (point.context + point.tokens / 2)


def _slope(points: Sequence[tuple[int, float, float]]) -> float:
    """Seconds for each unit of attention, by least squares over points of equal size; 0 if sizes differ."""
    above = below = 0.0
    for size in {point[0] for point in points}:
        alike = [(x, seconds) for one, x, seconds in points if one == size]
        mean_x = sum(x for x, _ in alike) / len(alike)
        mean_s = sum(seconds for _, seconds in alike) / len(alike)
        above += sum((x - mean_x) * (seconds - mean_s) for x, seconds in alike)
        below += sum((x - mean_x) ** 2 for x, _ in alike)
    return max(0.0, above / below) if below else 0.0


def _line(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The mean of each size, by size, never falling: more tokens are no cheaper, whatever a clock said."""
    line: list[tuple[int, float]] = []
    for size in sorted({size for size, _ in points}):
        alike = [seconds for one, seconds in points if one == size]
        seconds = max(0.0, sum(alike) / len(alike))
        line.append((size, max(seconds, line[-1][1]) if line else seconds))
    return line


def _at(line: Sequence[tuple[int, float]], size: float) -> float:
    if size <= line[0][0] or len(line) == 1:
        return line[0][1] * max(1.0, size / line[0][0] if len(line) == 1 else 1.0)
    at = min(len(line) - 1, bisect_left(line, (size, 0.0)))
    (low, low_s), (high, high_s) = line[at - 1], line[at]
    return low_s + (high_s - low_s) * (size - low) / (high - low)


@dataclass(frozen=True, slots=True)
class Calibration:
    """What virtual time is made of, for one model on one kind of device.

    Attributes:
        steps: how long they take.
        link_bytes_s: of copies between the device and the host, each way.
        pin_s_per_gib: to make host memory for the balloon.
        load_s: from the start of an engine until it can serve.
        pool_bytes: memory for KV and activations that was found; None if it is not known.
        device: what it is of.
        sources: where each figure comes from, by its name.
    """

    steps: StepSeconds
    link_bytes_s: float
    pin_s_per_gib: float
    load_s: float
    pool_bytes: int | None = None
    device: Device = "cuda"
    sources: Mapping[str, str] = field(default_factory=dict)
