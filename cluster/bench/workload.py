"""What a benchmark asks for: arrival times, prompts and output lengths, all of it from a seed.

Lengths and arrivals of random prompts follow `vllm bench serve`, so that figures compare. Owns no clock
and sends nothing. The workloads that have a name are in `named`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.errors import BallonetError

_SPECIAL_IDS = 1000  # vocabularies keep control tokens at the front: prompts leave these ids out
# Common words, one token each in nearly every vocabulary.
_COMMON = """
the of and to in is was for on that by this with from at not are but had have you which one were all they
when there can more if out so what time up go about than into could state only new year some take come
these know see use get like then first any work now may such give over think most even find day also after
way many must look before great back through long where much should well people down own just because good
each those feel seem how high too place little world very still nation hand old life tell write become here
"""
_WORDS = _COMMON.split()


class BenchError(BallonetError):
    """A benchmark cannot run as asked; the message says which option or line, and what to do."""


class OptionError(BenchError):
    """An option, or the file it names, makes no benchmark; raised before the first request."""


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request, before it is sent: a prompt by itself, or a later turn of a session.

    A later turn's prompt is the prompt before it, the answer that came to that, and tokens of its own.

    Attributes:
        arrival_s: when it is sent, from the start of the run; of no meaning for a later turn.
        prompt_tokens: length of the prompt, all that was said before included; an estimate where only
            `text` is known.
        output_tokens: tokens to generate.
        parts: (label, length) of each stretch of random tokens; an equal label is an equal stretch, which
            is how prompts share prefixes. A later turn has its own tokens alone here.
        text: the prompt itself, where the dataset has one.
        follows: place in the workload of the turn before it, which must be a lower one; None begins a
            session, or is all of it.
        think_s: of a later turn, seconds from the end of the answer before it until it is sent.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    parts: tuple[tuple[str, int], ...] = ()
    text: str | None = None
    follows: int | None = None
    think_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in order of arrival, each turn of a session behind the one that it follows.

    Attributes:
        seed: of arrivals and tokens.
        vocab_size: random token ids lie below it.
        request_rate: requests/s that the arrivals were drawn for; None for a trace's own times.
        kv_gib: memory for the KV cache that the workload is meant for; None is all there is.
    """

    name: str
    requests: tuple[PlannedRequest, ...]
    seed: int
    vocab_size: int = 32_000
    request_rate: float | None = math.inf
    kv_gib: float | None = None

    @property
    def has_sessions(self) -> bool:
        """Whether some request has to wait for another one's answer."""
        return any(request.follows is not None for request in self.requests)

    def followers(self) -> dict[int, list[int]]:
        """Places of the turns that follow a turn, by its place."""
        found: dict[int, list[int]] = {}
        for place, request in enumerate(self.requests):
            if request.follows is not None:
                found.setdefault(request.follows, []).append(place)
        return found

    def only(self, places: Sequence[int]) -> Workload:
        """The requests at these places, in rising order; each turn's earlier ones must be among them."""
        moved = {place: index for index, place in enumerate(places)}
        kept = (self.requests[place] for place in places)
        requests = (replace(r, follows=None if r.follows is None else moved[r.follows]) for r in kept)
        return replace(self, requests=tuple(requests))

    def token_ids(self, request: PlannedRequest) -> list[int]:
        """The prompt as token ids, of a later turn its own: the same for the same seed, everywhere."""
        lowest = min(_SPECIAL_IDS, self.vocab_size // 2)
        ids = range(lowest, self.vocab_size)
        tokens: list[int] = []
        for label, length in request.parts:
            tokens += random.Random(f"{self.seed}/{label}").choices(ids, k=length)
        return tokens

    def words(self, request: PlannedRequest) -> str:
        """The prompt, of a later turn its own part, as text of about one token a word."""
        if request.text is not None:
            return request.text
        words: list[str] = []
        for label, length in request.parts:
            words += random.Random(f"{self.seed}/{label}").choices(_WORDS, k=length)
        return " ".join(words)

    def probes(self, count: int) -> list[PlannedRequest]:
        """Requests as long as the first ones, of random tokens that no other request has.

        For trying a server out and warming it up: had they the measured prompts, a server that caches
        prefixes would be measured on a warm cache.
        """
        probes = []
        for index in range(count):
            like = self.requests[index % len(self.requests)]
            parts = ((f"probe {index}", like.prompt_tokens),)
            probe = replace(like, arrival_s=0.0, parts=parts, text=None, follows=None)
            probes.append(probe if like.text is None else replace(probe, text=self.words(probe)))
        return probes


@dataclass(frozen=True, slots=True)
class RandomPlan:
    """A workload of random prompts; options as in `vllm bench serve --dataset-name random`.

    Attributes:
        range_ratio: lengths are uniform within that share of the given ones, below and above.
        prefix_len: tokens that all prompts share, before the random ones.
        request_rate: requests/s; infinity sends all at once.
        burstiness: shape of the gamma distribution of gaps; 1 is a Poisson process, more is steadier.
    """

    num_prompts: int
    input_len: int
    output_len: int
    range_ratio: float = 0.0
    prefix_len: int = 0
    request_rate: float = math.inf
    burstiness: float = 1.0
    seed: int = 0
    vocab_size: int = 32_000
    kv_gib: float | None = None

    def workload(self, name: str) -> Workload:
        """The plan with its dice thrown.

        Raises:
            BenchError: a number that makes no workload.
        """
        self._check()
        dice = random.Random(f"{self.seed}/lengths")
        arrivals = arrival_times(self.num_prompts, self.request_rate, self.burstiness, self.seed)
        prefix = (("prefix", self.prefix_len),) if self.prefix_len else ()
        requests = []
        for index, arrival_s in enumerate(arrivals):
            fresh = _length(dice, self.input_len, self.range_ratio)
            parts = (*prefix, (f"request {index}", fresh))
            output = _length(dice, self.output_len, self.range_ratio)
            requests.append(PlannedRequest(arrival_s, self.prefix_len + fresh, output, parts))
        return Workload(
            name, tuple(requests), self.seed, self.vocab_size, self.request_rate, kv_gib=self.kv_gib
        )

    def _check(self) -> None:
        for name, value in (("num-prompts", self.num_prompts), ("random-output-len", self.output_len)):
            if value < 1:
                raise BenchError(f"--{name} must be at least 1, not {value}")
        if self.input_len < 0 or self.prefix_len < 0 or self.input_len + self.prefix_len < 1:
            raise BenchError(
                f"a prompt needs a token: --random-input-len is {self.input_len} and --random-prefix-len "
                f"{self.prefix_len}"
            )
        if not 0 <= self.range_ratio < 1:
            raise BenchError(f"--random-range-ratio must be at least 0 and below 1, not {self.range_ratio}")


def _length(dice: random.Random, length: int, ratio: float) -> int:
    low, high = math.floor(length * (1 - ratio)), math.ceil(length * (1 + ratio))
    return max(1, dice.randint(low, high)) if length else 0


def arrival_times(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds from the start, rising; scaled so that the last one is `count / rate`, as vLLM does it.

    Raises:
        BenchError: a rate or burstiness that is not positive.
    """
    if not rate > 0:
        raise BenchError(f"--request-rate must be positive (requests a second) or inf, not {rate}")
    if not burstiness > 0:
        raise BenchError(f"--burstiness must be positive, not {burstiness}")
    if math.isinf(rate):
        return [0.0] * count
    if math.isinf(burstiness):
        return [(index + 1) / rate for index in range(count)]
    dice, times, now = random.Random(f"{seed}/arrivals"), [], 0.0
    for _ in range(count):
        now += dice.gammavariate(burstiness, 1.0)
        times.append(now)
    return [time * count / rate / now for time in times]


def with_arrivals(workload: Workload, rate: float, burstiness: float) -> Workload:
    """The same requests at the times of a rate instead of their own; later turns wait for answers still."""
    num_first = sum(request.follows is None for request in workload.requests)
    times = iter(arrival_times(num_first, rate, burstiness, workload.seed))
    moved = (replace(r, arrival_s=next(times)) if r.follows is None else r for r in workload.requests)
    return replace(workload, requests=tuple(moved), request_rate=rate)
