"""What became of the requests of each model, counted as they end, and curves over time."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from cluster.planner.fleet import Fleet, SimulatedGroup

_STEP = math.log(1.01)  # percentiles are right to a hundredth
_LEAST = 1e-5


class Spread:
    """How values are spread, in little memory: a day has tens of millions of them."""

    def __init__(self) -> None:
        self._counts: defaultdict[int, int] = defaultdict(int)
        self._count = 0
        self.most = 0.0

    def add(self, value: float) -> None:
        """One more."""
        self._counts[round(math.log(max(value, _LEAST)) / _STEP)] += 1
        self._count += 1
        self.most = max(self.most, value)

    def percentile(self, percent: float) -> float | None:
        """None of no values."""
        left = self._count * percent / 100
        for place in sorted(self._counts):
            left -= self._counts[place]
            if left <= 1e-9:
                return min(math.exp(place * _STEP), self.most)
        return self.most if self._count else None


@dataclass
class Tally:
    """Of one model.

    Attributes:
        asked: requests that came.
        ended: requests that were answered in full, or refused.
        first_kept, pace_kept, both_kept: of them, whose promises were kept.
        refused: of them, by reason.
    """

    asked: int = 0
    ended: int = 0
    first_kept: int = 0
    pace_kept: int = 0
    both_kept: int = 0
    output_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    ttft_s: Spread = field(default_factory=Spread)
    tpot_s: Spread = field(default_factory=Spread)
    gap_s: Spread = field(default_factory=Spread)

    def refuse(self, why: str) -> None:
        """A request that will have no answer."""
        self.ended += 1
        self.refused[why] += 1

    def share(self, kept: int) -> float | None:
        """Of those that ended; None if none has."""
        return kept / self.ended if self.ended else None

    def figures(self, duration_s: float) -> dict[str, Any]:
        """Under the names of the summary."""
        gap = self.gap_s.most if self.gap_s.percentile(50) is not None else None
        return {
            "requests": self.asked,
            "ended": self.ended,
            "refused": dict(self.refused),
            "ttft_attainment": self.share(self.first_kept),
            "tpot_attainment": self.share(self.pace_kept),
            "attainment": self.share(self.both_kept),
            "goodput_rps": self.both_kept / max(1e-9, duration_s),
            "output_tok_s": self.output_tokens / max(1e-9, duration_s),
            "cached_share": self.cached_tokens / self.prompt_tokens if self.prompt_tokens else None,
            **{
                f"{name}_p{percent}_s": spread.percentile(percent)
                for name, spread in (("ttft", self.ttft_s), ("tpot", self.tpot_s))
                for percent in (50, 99)
            },
            "longest_gap_s": gap,
        }


@dataclass(frozen=True, slots=True)
class Sample:
    """One model at one time. Memory in bytes, of all its groups; shares are of what ended since the last one.

    Attributes:
        load_rps: requests/s that came since the last one; ended: requests that did since then.
        attainment: of both promises; None if nothing ended.
        kv, cached, activation, free: of the devices.
        balloon_limit, balloon_physical: of host memory; balloon_used: KV of requests, parked or copied ahead;
            balloon_cached: KV that no request needs.
    """

    time_s: float
    model_id: str
    load_rps: float
    ended: int
    attainment: float | None
    ttft_attainment: float | None
    tpot_attainment: float | None
    running: int
    parked: int
    waiting: int
    kv: int
    cached: int
    activation: int
    free: int
    balloon_limit: int
    balloon_physical: int
    balloon_used: int
    balloon_cached: int
    replicas: int
    starting: int


COLUMNS = tuple(one.name for one in fields(Sample))


@dataclass
class Recorder:
    """Takes samples of all models.

    Args:
        tallies: by model id.

    Attributes:
        peaks: by model id, the most at one time.
        node_held: bytes of host memory that all balloons of a node held, the most of any node.
        node_used: the same of KV of requests.
    """

    tallies: Mapping[str, Tally]
    samples: list[Sample] = field(default_factory=list)
    _before: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _before_s: float = 0.0
    peaks: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    node_held: int = 0
    node_used: int = 0

    def take(self, fleet: Fleet, now: float) -> None:
        """Every model, now."""
        passed_s = max(1e-9, now - self._before_s)
        for model_id, tally in self.tallies.items():
            counts = (tally.asked, tally.ended, tally.both_kept, tally.first_kept, tally.pace_kept)
            before = self._before.get(model_id, (0,) * 5)
            asked, ended, *kept = (new - old for new, old in zip(counts, before, strict=True))
            groups = [*fleet.of(model_id), *(g for g in fleet.leaving if g.model.model_id == model_id)]
            both, first, pace = (one / ended if ended > 0 else None for one in kept)
            memory = _memory(groups)
            counted = {"replicas": len(fleet.of(model_id)), "starting": fleet.num_starting(model_id)}
            sample = Sample(now, model_id, asked / passed_s, ended, both, first, pace, **memory, **counted)
            self.samples.append(sample)
            self._peak(sample)
            self._before[model_id] = counts
        self._before_s = now
        self.node_held = max(self.node_held, *fleet.held().values(), 0)
        self.node_used = max(self.node_used, *fleet.used().values(), 0)

    def _peak(self, sample: Sample) -> None:
        peaks = self.peaks[sample.model_id]
        used = {
            "device": sample.kv + sample.cached + sample.activation,
            "kv": sample.kv,
            "host": sample.balloon_physical,
            "host_used": sample.balloon_used,
            "replicas": sample.replicas,
            "waiting": sample.waiting,
            "parked": sample.parked,
        }
        for name, value in used.items():
            peaks[name] = max(peaks[name], value)


_SUMS = (
    *("running", "parked", "waiting", "kv", "cached", "activation", "free"),
    *("balloon_limit", "balloon_physical", "balloon_used", "balloon_cached"),
)


def _memory(groups: list[SimulatedGroup]) -> dict[str, int]:
    sums = dict.fromkeys(_SUMS, 0)
    for group in groups:
        snapshot, memory = group.snapshot, group.snapshot.memory
        unit = memory.chunk_bytes * group.model.num_ranks
        sums["running"] += snapshot.num_running
        sums["parked"] += snapshot.num_parked
        sums["waiting"] += snapshot.num_waiting
        sums["kv"] += memory.kv * unit
        sums["cached"] += memory.cached * unit
        sums["activation"] += memory.activation * unit
        sums["free"] += (memory.free + memory.retiring) * unit
        sums["balloon_limit"] += memory.balloon_limit * unit
        sums["balloon_physical"] += memory.balloon_physical * unit
        sums["balloon_used"] += (memory.balloon - memory.balloon_cached) * unit
        sums["balloon_cached"] += memory.balloon_cached * unit
    return sums
