"""What the steps of a driven engine did: how long decodes took, and what our memory went through.

A step is counted as a decode if every running sequence gained a token in it, none of them its first, nor
its first after a pause: then no prompt was computed beside. Its time is that between two steps' ends, as a
client sees it. The driver calls of a turn belong to the step it launched, which is read that many turns later
as the engine launches ahead: a prompt's are not a decode's.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from typing import Any, NamedTuple

from cluster.bench.summary import percentile
from engine.messages import EngineSnapshot

_PERCENTILES = (50.0, 99.0)


class Gain(NamedTuple):
    """Tokens that one request gained at one time.

    Attributes:
        num_cached_tokens: of its prompt, not computed again.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finished: bool
    error: str | None
    time_s: float
    num_cached_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """How many they are."""
        return len(self.token_ids)


class _Decode(NamedTuple):
    batch: int
    seconds: float


class StepWatch:
    """Follows an engine from step to step.

    Args:
        now_s: when the run begins.
        snapshot: of our engine then; None for a rival's.
        steps_ahead: steps that our engine launches, and maps memory for, before it has read one.
    """

    def __init__(self, now_s: float, snapshot: EngineSnapshot | None, steps_ahead: int = 0) -> None:
        self._ended_s = now_s
        self._first = self._newest = snapshot
        self._gainers: set[str] = set()
        self._decodes: list[_Decode] = []
        self._decode_calls = 0
        self._calls_ahead = deque([0] * steps_ahead)
        self._max_running = 0
        self._peaks = {"kv": 0, "cached": 0, "activation": 0, "balloon": 0}
        self._max_parked = 0

    def stepped(
        self, now_s: float, gains: Iterable[Gain], num_running: int, snapshot: EngineSnapshot | None
    ) -> None:
        """A step has ended.

        Args:
            gains: what it brought.
            num_running: sequences that hold KV after it.
        """
        gains = list(gains)
        gainers = {gain.request_id for gain in gains if gain.token_ids}
        running = num_running + sum(gain.finished for gain in gains)
        self._max_running = max(self._max_running, running)
        is_decode = bool(gainers) and gainers <= self._gainers and len(gainers) == running
        if is_decode:
            self._decodes.append(_Decode(len(gainers), now_s - self._ended_s))
        if snapshot is not None:
            self._note_memory(snapshot, is_decode)
        self._gainers = gainers or self._gainers
        self._ended_s = now_s

    def slept(self, now_s: float) -> None:
        """There was nothing to do until now."""
        self._ended_s = now_s

    def figures(self) -> dict[str, Any]:
        """Of the whole run; those of memory where there were snapshots."""
        steps: dict[str, Any] = {"max_running": self._max_running, "decode_steps": len(self._decodes)}
        steps |= _figures_of(self._decodes, "decode")
        widest = max((decode.batch for decode in self._decodes), default=0)
        at_widest = [decode for decode in self._decodes if decode.batch == widest]
        steps |= {"widest_decode": widest} | _figures_of(at_widest, "widest_decode")
        if self._first is None or self._newest is None:
            return {"steps": steps}
        return {"steps": steps, "memory": self._memory(self._first, self._newest)}

    def _note_memory(self, snapshot: EngineSnapshot, is_decode: bool) -> None:
        if self._newest is not None:
            self._calls_ahead.append(snapshot.memory.driver_calls - self._newest.memory.driver_calls)
            self._decode_calls += self._calls_ahead.popleft() * is_decode
        for name, peak in self._peaks.items():
            self._peaks[name] = max(peak, getattr(snapshot.memory, name))
        self._max_parked = max(self._max_parked, snapshot.num_parked)
        self._newest = snapshot

    def _memory(self, first: EngineSnapshot, last: EngineSnapshot) -> dict[str, Any]:
        before, after = first.memory, last.memory
        gib = after.chunk_bytes / 2**30
        return {
            "chunk_bytes": after.chunk_bytes,
            "pool_gib": round(after.total * gib, 4),
            **{f"max_{name}_gib": round(chunks * gib, 4) for name, chunks in self._peaks.items()},
            "driver_calls": after.driver_calls - before.driver_calls,
            "driver_calls_beside": after.driver_calls_beside - before.driver_calls_beside,
            "driver_calls_in_decode_steps": self._decode_calls,
            "engine_steps": last.num_steps - first.num_steps,
            "preemptions": last.num_preemptions - first.num_preemptions,
            "parkings": last.num_parkings - first.num_parkings,
            "max_parked": self._max_parked,
            "decisions": dict(Counter(dict(last.decisions)) - Counter(dict(first.decisions))),
            "copied_out_gib": round((after.copied_out_bytes - before.copied_out_bytes) / 2**30, 4),
            "copied_in_gib": round((after.copied_in_bytes - before.copied_in_bytes) / 2**30, 4),
            "prefix_queries": last.prefix_queries - first.prefix_queries,
            "prefix_hits": last.prefix_hits - first.prefix_hits,
        }


def _figures_of(decodes: list[_Decode], name: str) -> dict[str, float]:
    """Step times in ms, the mean of the longest hundredth among them, and tokens/s."""
    if not decodes:
        return {}
    ms = sorted(decode.seconds * 1e3 for decode in decodes)
    longest = ms[-max(1, len(ms) // 100) :]
    figures = {f"{name}_step_p{percent:g}_ms": percentile(ms, percent) for percent in _PERCENTILES}
    figures |= {f"{name}_step_max_ms": ms[-1], f"{name}_step_longest_1pct_ms": sum(longest) / len(longest)}
    tokens = sum(decode.batch for decode in decodes)
    figures[f"{name}_tok_s"] = tokens / max(1e-9, sum(ms) / 1e3)
    return {name: round(value, 4) for name, value in figures.items()}
