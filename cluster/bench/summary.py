"""From what happened to each request to the figures of a run. Pure arithmetic.

Definitions are those of `vllm bench serve`: percentiles interpolate linearly, TPOT is the time after the
first token over the tokens after it, ITL is the time between two deltas of a stream, and a request is
good if it meets every objective. Three figures are added, because the others can flatter: time to the
second token, the longest gap between two deltas, and the share of all requests, failed ones included,
that met the objectives.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.bench.workload import BenchError

OBJECTIVES = ("ttft", "tpot", "e2el")


@dataclass(slots=True)
class Record:
    """One request as its client saw it. Times are seconds from the start of the run.

    Attributes:
        start_s: when it was sent.
        delta_times_s: when each delta with tokens came.
        end_s: when the last delta came.
        output_tokens: tokens generated, as the server counted them; or deltas, if it did not.
        finished: whether the stream reached its end.
        error: why it failed; None if it did not.
        counted: whether the server counted the output tokens (`usage`); else deltas were counted.
        pieces: the text, as it came.
        token_ids: the answer's tokens, as far as they are told.
        cached_tokens: tokens of the prompt that were not computed again; None if it was not told.
    """

    start_s: float
    prompt_tokens: int
    delta_times_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    output_tokens: int = 0
    finished: bool = False
    error: str | None = None
    counted: bool = False
    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    cached_tokens: int | None = None

    @property
    def succeeded(self) -> bool:
        """Whether it counts in the figures."""
        return self.finished and self.error is None

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.delta_times_s[0] - self.start_s

    @property
    def ttst_s(self) -> float | None:
        """Time to the second delta with tokens; None if there was only one."""
        return self.delta_times_s[1] - self.start_s if len(self.delta_times_s) > 1 else None

    @property
    def e2el_s(self) -> float:
        """From sending to the last token."""
        return self.end_s - self.start_s

    @property
    def tpot_s(self) -> float | None:
        """Time for each token after the first; None if there was only one."""
        if self.output_tokens < 2:
            return None
        return (self.e2el_s - self.ttft_s) / (self.output_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Between each two deltas."""
        times = self.delta_times_s
        return [later - earlier for earlier, later in zip(times, times[1:], strict=False)]

    def meets(self, objectives_ms: Mapping[str, float]) -> bool:
        """Whether it succeeded within every objective; one token has a TPOT of 0."""
        if not self.succeeded:
            return False
        reached = {"ttft": self.ttft_s, "tpot": self.tpot_s or 0.0, "e2el": self.e2el_s}
        return all(reached[name] * 1e3 <= limit for name, limit in objectives_ms.items())


@dataclass(frozen=True, slots=True)
class Series:
    """Milliseconds of one measure over all successful requests (or over all gaps)."""

    mean_ms: float
    median_ms: float
    std_ms: float
    max_ms: float
    percentiles_ms: Mapping[float, float]


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of one run.

    Attributes:
        interrupted: requests that Ctrl-C left unfinished; neither completed nor failed.
        cached_tokens: input tokens of completed requests that were not computed again, where that was told.
        request_goodput: requests/s that met every objective; None without objectives.
        attainment: share of completed and failed requests that met an objective, and under "all" every
            one of them.
        peak_output_tok_s: most output tokens in a whole second of the run.
        peak_concurrency: most requests that were open during a second of the run.
        series: by name: ttft, tpot, itl, e2el, ttst (second token), gap (longest of each request).
    """

    completed: int
    failed: int
    interrupted: int
    first_error: str | None
    duration_s: float
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    request_goodput: float | None
    attainment: Mapping[str, float]
    peak_output_tok_s: float
    peak_concurrency: int
    series: Mapping[str, Series]

    @property
    def request_throughput(self) -> float:
        """Completed requests/s."""
        return self.completed / self.duration_s

    @property
    def output_tok_s(self) -> float:
        """Output tokens/s of completed requests."""
        return self.output_tokens / self.duration_s

    @property
    def total_tok_s(self) -> float:
        """Input and output tokens/s of completed requests."""
        return (self.input_tokens + self.output_tokens) / self.duration_s


def summarise(
    records: Sequence[Record],
    duration_s: float,
    objectives_ms: Mapping[str, float] | None = None,
    percentiles: Sequence[float] = (99.0,),
) -> Summary:
    """All figures of a run.

    Args:
        records: of every request that was sent.
        duration_s: from the first request's due time to the last end.
        objectives_ms: `ttft`, `tpot`, `e2el` limits.
    """
    good = [record for record in records if record.succeeded]
    failed = [record for record in records if record.error is not None]
    objectives = objectives_ms or {}
    met = sum(record.meets(objectives) for record in records)
    judged = len(good) + len(failed)
    attainment = {name: _share(records, {name: limit}, judged) for name, limit in objectives.items()}
    if objectives:
        attainment["all"] = met / judged if judged else 0.0
    measures = {
        "ttft": [record.ttft_s for record in good],
        "tpot": [value for record in good if (value := record.tpot_s) is not None],
        "itl": [gap for record in good for gap in record.gaps_s],
        "e2el": [record.e2el_s for record in good],
        "ttst": [value for record in good if (value := record.ttst_s) is not None],
        "gap": [max(record.gaps_s) for record in good if record.gaps_s],
    }
    return Summary(
        completed=len(good),
        failed=len(failed),
        interrupted=len(records) - judged,
        first_error=failed[0].error if failed else None,
        duration_s=max(duration_s, 1e-9),
        input_tokens=sum(record.prompt_tokens for record in good),
        output_tokens=sum(record.output_tokens for record in good),
        cached_tokens=sum(record.cached_tokens or 0 for record in good),
        request_goodput=met / max(duration_s, 1e-9) if objectives else None,
        attainment=attainment,
        peak_output_tok_s=_peak_tokens(good),
        peak_concurrency=_peak_concurrency(good),
        series={name: _series(values, percentiles) for name, values in measures.items()},
    )


def _share(records: Sequence[Record], objective: Mapping[str, float], judged: int) -> float:
    return sum(record.meets(objective) for record in records) / judged if judged else 0.0


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest of the sorted values; 0 of no values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def _series(seconds: Sequence[float], percentiles: Sequence[float]) -> Series:
    ms = sorted(value * 1e3 for value in seconds)
    if not ms:
        return Series(0.0, 0.0, 0.0, 0.0, dict.fromkeys(percentiles, 0.0))
    return Series(
        mean_ms=statistics.fmean(ms),
        median_ms=statistics.median(ms),
        std_ms=statistics.pstdev(ms),
        max_ms=ms[-1],
        percentiles_ms={percent: percentile(ms, percent) for percent in percentiles},
    )


def _peak_tokens(records: Sequence[Record]) -> float:
    """Tokens of the fullest second. A delta of several tokens counts as that many, evenly spread."""
    start_s = min((record.start_s for record in records), default=0.0)
    tokens: defaultdict[int, float] = defaultdict(float)
    for record in records:
        weight = record.output_tokens / len(record.delta_times_s)
        for time_s in record.delta_times_s:
            tokens[int(time_s - start_s)] += weight
    return max(tokens.values(), default=0.0)


def _peak_concurrency(records: Sequence[Record]) -> int:
    """Requests open at some time of the fullest second, as vLLM counts them."""
    seconds: Counter[int] = Counter()
    start_s = min((record.start_s for record in records), default=0.0)
    for record in records:
        seconds.update(range(int(record.start_s - start_s), int(record.end_s - start_s) + 1))
    return max(seconds.values(), default=0)


def read_objectives(pairs: Sequence[str]) -> dict[str, float]:
    """`ttft:200 tpot:50`, in milliseconds, as `vllm bench serve --goodput` takes them.

    Raises:
        BenchError: another name, or no number.
    """
    objectives: dict[str, float] = {}
    for pair in pairs:
        name, _, value = pair.partition(":")
        try:
            limit = float(value)
        except ValueError:
            limit = -1.0
        if name not in OBJECTIVES or not 0 <= limit < math.inf:
            raise BenchError(
                f"--goodput {pair!r}: write NAME:MILLISECONDS, with a name of {', '.join(OBJECTIVES)}, "
                "such as ttft:200"
            )
        objectives[name] = limit
    return objectives
