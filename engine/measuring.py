"""How long a real engine's steps, copies and start take on this machine: what `engine.calibration` reads.

A door of this package, beside the actor and the simulation. The engine is that of the configuration, driven
step by step in this process, and times are what its clients would see: the host's part of a step included.
"""

from __future__ import annotations

import gc
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from engine.build import build_engine
from engine.config import EngineConfig
from engine.core import Engine
from engine.device import make_link
from engine.memory.copies import Direction
from engine.memory.kv_geometry import KvGeometry
from engine.messages import GenerateRequest, SamplingParams, TokenDelta
from engine.model.loader import facts_on
from engine.sizes import kv_geometry

_TIMES = 3  # each prompt; the median counts
_FEW, _MANY = 6, 24  # gaps between tokens, of each decode
_POINT_S = 2.0  # that one point should take: a slow one is measured fewer times
_BUDGET_S = 60.0  # for all points but those without which there is no calibration
_SLAB_BYTES = 256 << 20
_USABLE = 0.7  # of the pool, for what is measured at once
_DEADLINE_S = 120.0  # for one point: an engine that needs longer is not one to plan with
Say = Callable[[str], None]


def has_gpu() -> bool:
    """Whether torch finds one."""
    return torch.cuda.is_available()


def measure(config: EngineConfig, say: Say = lambda text: None) -> dict[str, Any]:
    """Load the model, measure it, and let it go; figures under the names of the calibration file.

    Raises:
        ConfigError, ModelLoadError: the engine does not start.
    """
    # Points are of prompts that were never seen, and of prefixes that were.
    config = replace(config, memory=replace(config.memory, enable_prefix_caching=True))
    device = torch.device(config.device)
    gauge = Gauge(config, kv_geometry(facts_on(device, config), config.memory))
    found = gauge.figures(say)
    link, pin = _link(device)
    return found | {
        "link_bytes_s": link,
        "pin_s_per_gib": pin,
        "source": _whose(device),
        "device": device.type,
    }


class Gauge:
    """An engine that is measured.

    Args:
        geometry: how its KV fills chunks.
        build: makes it, given the configuration, what it is to publish to, and the clock.
    """

    def __init__(
        self,
        config: EngineConfig,
        geometry: KvGeometry,
        build: Callable[..., Engine] = build_engine,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._config, self._geometry = config, geometry
        self._clock = clock
        self._dice = random.Random(0)
        self._published: list[tuple[float, Sequence[TokenDelta]]] = []
        self._number = 0
        self._decode_s = 0.0  # of the newest point
        self.engine = build(config, self._publish, clock)
        gc.collect()
        gc.freeze()  # as the engine's actor does

    def figures(self, say: Say) -> dict[str, Any]:
        """All points of steps that there is time for, the more important ones first, and the start."""
        self.prefill(16, 0)  # what happens once happens here
        points = self._points()
        found: dict[str, list[dict[str, Any]]] = {"prefill": [], "decode": []}
        until_s = self._clock() + _BUDGET_S
        for number, (kind, size, context) in enumerate(points):
            if self._clock() > until_s and all(found.values()):
                say(f"{len(points) - number} of {len(points)} points are left out, after {_BUDGET_S:.0f} s")
                break
            point = self.prefill(size, context) if kind == "prefill" else self.decode(size, context)
            found[kind].append(point)
            what = "prompt of {tokens} tokens" if kind == "prefill" else "{batch} decodes"
            say(f"{number + 1}/{len(points)}: {what} behind {{context}}: {{seconds:.4f}} s".format(**point))
        info = self.engine.info
        return found | {"load_s": info.load_s, "pool_bytes": info.pool_bytes}

    def prefill(self, tokens: int, context: int) -> dict[str, Any]:
        """A prompt's time to its first token, behind a context that is cached."""
        found: list[tuple[float, int]] = []
        while len(found) < _TIMES and (not found or sum(seconds for seconds, _ in found) < _POINT_S):
            before = self._tokens(context)
            if context:
                self._answer([before], 1)
            started = self._clock()
            published = self._answer([(*before, *self._tokens(tokens))], 1)
            last = published[-1][1][-1]
            found.append((published[0][0] - started, last.num_cached_tokens))
        cached = found[-1][1]
        seconds = statistics.median(seconds for seconds, _ in found)
        return {"tokens": context + tokens - cached, "context": cached, "seconds": seconds}

    def decode(self, batch: int, context: int) -> dict[str, Any]:
        """Seconds between two tokens of `batch` sequences that all decode."""
        prompts = [self._tokens(context) for _ in range(batch)]
        count = max(_FEW, min(_MANY, int(_POINT_S / self._decode_s))) if self._decode_s else _MANY
        # While prompts are computed the first sequences gain tokens already: as many as there are prompts.
        published = self._answer(prompts, 2 * batch + count)
        ends = [(at, len({delta.request_id for delta in deltas})) for at, deltas in published]
        gaps = [
            at - before
            for (before, earlier), (at, num) in zip(ends, ends[1:], strict=False)
            if num == earlier == batch
        ]
        self._decode_s = statistics.median(gaps)
        return {"batch": batch, "context": context + batch + count // 2, "seconds": self._decode_s}

    def _points(self) -> list[tuple[str, int, int]]:
        """(kind, tokens or batch, context), the more important first: what products cost, then attention."""
        prompts, batches = list(self._prompt_sizes()), list(self._batches())
        least = {batch: context for batch, context in reversed(batches)}
        short: list[tuple[str, int, int]] = [("prefill", size, 0) for size, context in prompts if not context]
        short += [("decode", batch, least[batch]) for batch in dict(batches)]
        long = [("decode", batch, context) for batch, context in batches if context != least[batch]]
        long += [("prefill", size, context) for size, context in prompts if context]
        return short + long[::-1]

    def _prompt_sizes(self) -> Iterator[tuple[int, int]]:
        limits, longest = self._config.scheduler, self.engine.info.max_model_len - 1
        largest = min(limits.max_num_batched_tokens, longest)
        sizes = [size for size in (16, 64, 256, 1024, 4096, 16384) if size < largest] + [largest]
        for size in sizes:
            yield size, 0
        room = min(longest, int(_USABLE * self._pool_tokens))
        for size in sizes[-3:-1] or sizes:
            context = (room - size) // 2
            if context > 2 * self.engine.info.tokens_per_chunk:
                yield size, min(context, 16 * size)

    def _batches(self) -> Iterator[tuple[int, int]]:
        most, longest = self._config.scheduler.max_num_seqs, self.engine.info.max_model_len
        batches = [batch for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256) if batch < most] + [most]
        for batch in batches:
            tokens = 2 * batch + _MANY
            room = min(longest, int(_USABLE * self._pool_tokens / batch)) - tokens
            contexts = [size for size in (32, 512, 4096) if size <= room]
            yield from (
                (batch, context) for context in sorted({contexts[0], contexts[-1]} if contexts else ())
            )

    @property
    def _pool_tokens(self) -> int:
        """Tokens whose KV the pool holds."""
        geometry = self._geometry
        rows = self.engine.snapshot.memory.total // geometry.num_groups
        return rows * geometry.tokens_per_chunk

    def _tokens(self, count: int) -> tuple[int, ...]:
        vocabulary = range(min(1000, self.engine.info.vocab_size // 2), self.engine.info.vocab_size)
        return tuple(self._dice.choices(vocabulary, k=count))

    def _answer(
        self, prompts: Sequence[tuple[int, ...]], num_tokens: int
    ) -> list[tuple[float, Sequence[TokenDelta]]]:
        """Have these answered, and wait; what was published, and when."""
        self._published = []
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        for prompt in prompts:
            self._number += 1
            self.engine.submit(GenerateRequest(f"measured {self._number}", prompt, sampling, unpaced=True))
        left, until_s, seen = len(prompts), self._clock() + _DEADLINE_S, 0
        while left:
            self.engine.step()
            left -= sum(d.finish_reason is not None for _, deltas in self._published[seen:] for d in deltas)
            seen = len(self._published)
            if self._clock() > until_s:
                raise TimeoutError(f"{len(prompts)} requests were not answered within {_DEADLINE_S:.0f} s")
        return [one for one in self._published if any(delta.token_ids for delta in one[1])]

    def _publish(self, deltas: Sequence[TokenDelta]) -> None:
        self._published.append((self._clock(), deltas))


def _link(device: torch.device) -> tuple[float, float]:
    """Bytes/s of copies to the host and back, the slower of both, and seconds a GiB of host memory takes."""
    chunk_bytes = 2 << 20
    copies, slabs = make_link(device, chunk_bytes)
    started = time.perf_counter()
    slab = slabs.make(_SLAB_BYTES)
    pin_s = (time.perf_counter() - started) * (1 << 30) / _SLAB_BYTES
    other = torch.ones(_SLAB_BYTES, dtype=torch.uint8, device=device)
    host = [slab.address + at for at in range(0, _SLAB_BYTES, chunk_bytes)]
    there = [other.data_ptr() + at for at in range(0, _SLAB_BYTES, chunk_bytes)]
    rates = []
    for direction in Direction:
        targets, sources = (there, host) if direction is Direction.IN else (host, there)
        times = []
        for _ in range(_TIMES + 1):  # the first touches pages
            started = time.perf_counter()
            copies.submit(direction, targets, sources, after_steps=False).wait()
            times.append(time.perf_counter() - started)
        rates.append(_SLAB_BYTES / statistics.median(times[1:]))
    copies.close()
    slab.free()
    return min(rates), pin_s


def _whose(device: torch.device) -> str:
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    )
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    return f"measured on {name}{threads}, {time.strftime('%Y-%m-%d')}, torch {torch.__version__}"
