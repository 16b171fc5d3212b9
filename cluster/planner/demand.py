"""The load of a plan: a trace's requests, or some drawn from a rate, for each model.

    trace.csv, trace.jsonl           Azure LLM inference or BurstGPT; Mooncake
    poisson:rate=4,in=1000,out=200   requests/s; mean tokens of prompts and of answers
    day:rate=4,swing=0.7,peak=14     the same over a day: more at its peak, less at night, and bursts

Requests are read or drawn one after another: a day of hundreds of groups is millions.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple, Protocol

from cluster.bench import traces
from cluster.bench.workload import OptionError, PlannedRequest

_DAY_S = 86_400.0
_BURST_TIMES = 3.0
_BURST_S = (30.0, 180.0)


class Asked(NamedTuple):
    """A request, and which model it is for."""

    at_s: float
    model: int
    request: PlannedRequest


class Source(Protocol):
    """The load of one model."""

    @property
    def lasts_s(self) -> float:
        """Seconds, if nobody says how long."""

    def requests(self, name: str, seed: int) -> Iterator[PlannedRequest]:
        """In order of arrival, from 0 on; endless if it is drawn."""


@dataclass(frozen=True, slots=True)
class TraceFile:
    """Requests at a trace's own times, its first one at 0."""

    path: Path
    read: tuple[PlannedRequest, ...]

    @property
    def lasts_s(self) -> float:
        return self.read[-1].arrival_s - self.read[0].arrival_s + 1e-9

    def requests(self, name: str, seed: int) -> Iterator[PlannedRequest]:
        start_s = self.read[0].arrival_s
        return (replace(one, arrival_s=one.arrival_s - start_s) for one in self.read)


@dataclass(frozen=True, slots=True)
class Drawn:
    """Requests drawn from a rate.

    Attributes:
        rate: requests/s on average, bursts not counted.
        prompt, output: mean tokens.
        sigma: of the logarithm of both, which are log-normal; 0 makes all alike.
        swing: share of the rate by which a day's peak is above it, and its night below.
        peak: hour of the day.
        bursts: in an hour, each of half a minute to three, at three times the rate.
        hours: that it lasts, if nobody says.
    """

    rate: float = 1.0
    prompt: float = 1000.0
    output: float = 200.0
    sigma: float = 0.5
    swing: float = 0.0
    peak: float = 14.0
    bursts: float = 0.0
    hours: float = field(default=0.25)

    @property
    def lasts_s(self) -> float:
        return self.hours * 3600

    def requests(self, name: str, seed: int) -> Iterator[PlannedRequest]:
        dice = random.Random(f"{seed}/{name}/requests")
        highest = self.rate * (1 + self.swing) * (_BURST_TIMES if self.bursts else 1.0)
        bursts = self._bursts(random.Random(f"{seed}/{name}/bursts"))
        burst, now_s, number = next(bursts), 0.0, 0
        while True:
            now_s += dice.expovariate(highest)
            while now_s > burst[1]:
                burst = next(bursts)
            if dice.random() * highest > self._level(now_s) * (_BURST_TIMES if now_s >= burst[0] else 1.0):
                continue
            prompt, output = self._length(dice, self.prompt), self._length(dice, self.output)
            number += 1
            yield PlannedRequest(now_s, prompt, output, ((f"{name} {number}", prompt),))

    def _level(self, now_s: float) -> float:
        hour = now_s / 3600 - self.peak
        return self.rate * (1 + self.swing * math.cos(2 * math.pi * hour / 24))

    def _bursts(self, dice: random.Random) -> Iterator[tuple[float, float]]:
        if not self.bursts:
            yield math.inf, math.inf
        end_s = 0.0
        while True:
            begin_s = end_s + dice.expovariate(self.bursts / 3600)
            end_s = begin_s + dice.uniform(*_BURST_S)
            yield begin_s, end_s

    def _length(self, dice: random.Random, mean: float) -> int:
        if not self.sigma:
            return max(1, round(mean))
        return max(1, round(dice.lognormvariate(math.log(mean) - self.sigma**2 / 2, self.sigma)))


_KINDS = {"poisson": Drawn(), "day": Drawn(swing=0.7, bursts=2.0, hours=24.0)}
_NAMES = {"in": "prompt", "out": "output"}


def read_source(text: str) -> Source:
    """A trace's file, or what a load is drawn from.

    Raises:
        OptionError: neither; the message names the file's line or the setting.
    """
    kind, colon, settings = text.partition(":")
    if colon and kind in _KINDS:
        return _drawn(text, _KINDS[kind], settings)
    path = Path(text).expanduser()
    if not path.is_file():
        raise OptionError(
            f"--trace {text}: there is no such file; or draw a load, as in poisson:rate=4,in=1000,out=200 or "
            "day:rate=4,swing=0.7,in=1000,out=200"
        )
    reader = _reader(path)
    return TraceFile(path, tuple(reader(path, sys.maxsize)))


def _drawn(text: str, base: Drawn, settings: str) -> Drawn:
    known = {one.name for one in fields(Drawn)}
    spelt = sorted((known - set(_NAMES.values())) | set(_NAMES))
    values: dict[str, float] = {}
    for part in filter(None, settings.split(",")):
        name, _, value = part.partition("=")
        key = _NAMES.get(name, name)
        if key not in known or name in _NAMES.values():
            raise OptionError(f"--trace {text}: {name!r} is not known; settings are {', '.join(spelt)}")
        try:
            values[key] = float(value)
        except ValueError:
            values[key] = math.nan
        least = 0.0 if key in ("sigma", "swing", "bursts", "peak") else 1e-9
        if not least <= values[key] < math.inf or (key == "swing" and values[key] > 1):
            raise OptionError(
                f"--trace {text}: {name} must be a number{_RANGES.get(key, ' above 0')}, not {value!r}"
            )
    return replace(base, **values)


_RANGES = {"swing": " from 0 to 1"} | dict.fromkeys(("sigma", "bursts", "peak"), " of at least 0")


def _reader(path: Path) -> traces.Reader:
    """By what the first line looks like."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            head = file.readline()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--trace {path} cannot be read: {error}") from error
    if head.lstrip().startswith("{"):
        return traces.read_mooncake
    if "ContextTokens" in head:
        return traces.read_azure
    if "Request tokens" in head:
        return traces.read_burstgpt
    known = (
        "Azure LLM inference (TIMESTAMP,ContextTokens,GeneratedTokens), BurstGPT (Timestamp,Model,Request "
        "tokens,...) or Mooncake (JSON objects with timestamp, input_length and output_length)"
    )
    if not head:
        raise OptionError(f"--trace {path} is empty; known are {known}")
    raise OptionError(f"{path}, line 1: {head.strip()[:60]!r} begins no trace that is known: {known}")


def sources_of(texts: Sequence[str], model_ids: Sequence[str]) -> dict[str, Source]:
    """Each model's load, from `[MODEL=]TRACE` options.

    Raises:
        OptionError: a model has none or two, or is not in the file.
    """
    named: dict[str, str] = {}
    plain: list[str] = []
    for text in texts:
        name, equals, trace = text.partition("=")
        if equals and name in model_ids:
            if name in named:
                raise OptionError(f"--trace: two for {name}")
            named[name] = trace
        elif equals and not any(mark in name for mark in ":/."):
            raise OptionError(
                f"--trace {text}: there is no model {name!r}; the file has {', '.join(model_ids)}"
            )
        else:
            plain.append(text)
    if len(plain) > 1:
        raise OptionError("--trace: say which model each is for, as in --trace MODEL=TRACE")
    missing = [name for name in model_ids if name not in named]
    if missing and not plain:
        raise OptionError(f"--trace: none for {', '.join(missing)}; give --trace MODEL=TRACE")
    shared = read_source(plain[0]) if plain and missing else None
    if isinstance(shared, TraceFile) and len(missing) > 1:
        raise OptionError(
            f"--trace {plain[0]}: whose requests are these? The file has {', '.join(missing)}; give --trace "
            "MODEL=TRACE for each"
        )
    return {name: read_source(named[name]) if name in named else _given(shared) for name in model_ids}


def _given(source: Source | None) -> Source:
    if source is None:
        raise OptionError("--trace: none for a model")
    return source


def merged(sources: Mapping[str, Source], seed: int, begin_s: float, end_s: float) -> Iterator[Asked]:
    """The requests of all models in order of arrival, those of a stretch of time, which begins at 0."""

    def of(place: int, name: str) -> Iterator[Asked]:
        requests = sources[name].requests(name, seed)
        late_enough = itertools.dropwhile(lambda one: one.arrival_s < begin_s, requests)
        stretch = itertools.takewhile(lambda one: one.arrival_s < end_s, late_enough)
        return (Asked(one.arrival_s - begin_s, place, one) for one in stretch)

    return heapq.merge(*(of(place, name) for place, name in enumerate(sources)), key=lambda one: one[:2])
