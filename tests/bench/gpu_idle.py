"""How much of a steady decode the GPU spends between kernels, from CUPTI's records of every kernel.

Two figures, because recording costs time itself: idle within the recorded span, and kernel time of a
step over the duration of a step that was not recorded.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.bench.workload import Workload
from tests.bench.in_process import BallonetStepper

_BUSY_KINDS = ("kernel", "gpu_memcpy", "gpu_memset")
_SETTLE_TOKENS = 4  # by then every prefill is over
_UNRECORDED_STEPS = 40
_RECORDED_STEPS = 30
_STARTING_STEPS = 2
_TOP_KERNELS = 12
_MOST_SEQUENCES = 256  # that the benchmarks' engine runs at once


@dataclass(frozen=True, slots=True)
class Idle:
    """Idle share of steady decoding.

    Attributes:
        recorded_idle: share of the recorded span in which no kernel or copy ran.
        unrecorded_idle: 1 - kernel time of a step / duration of a step without recording; below 0 if
            recording slowed the kernels themselves.
        kernels_ms: (name, ms a step) of the kernels that take most, as `time_of_each` divides it.
    """

    batch: int
    step_ms: float
    recorded_step_ms: float
    busy_ms_per_step: float
    recorded_idle: float
    unrecorded_idle: float
    kernels_per_step: float
    kernels_ms: tuple[tuple[str, float], ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def time_of_each(events: Iterable[tuple[str, float, float]]) -> Counter[str]:
    """Microseconds by name of (name, start, end): each moment belongs to what started first.

    So overlaps count once, and a kernel that starts early, and waits for the one ahead, is charged from
    that one's end.
    """
    totals: Counter[str] = Counter()
    reached = float("-inf")
    for name, start, end in sorted(events, key=lambda event: event[1:]):
        totals[name] += max(0.0, end - max(start, reached))  # type: ignore[assignment]
        reached = max(reached, end)
    return totals


def device_events(trace: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(name, start, end) in microseconds of all that ran on the device, of a chrome trace."""
    return [
        (event["name"], float(event["ts"]), float(event["ts"]) + float(event["dur"]))
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in _BUSY_KINDS
    ]


def idle_of(events: list[tuple[str, float, float]], batch: int, step_ms: float, recorded_steps: int) -> Idle:
    """The figures of recorded events.

    Raises:
        ValueError: nothing was recorded.
    """
    if not events:
        raise ValueError("the profiler recorded no kernel: is CUPTI there?")
    spans = [(start, end) for _, start, end in events]
    span_us = max(end for _, end in spans) - min(start for start, _ in spans)
    totals = time_of_each(events)
    busy_us = totals.total()
    busy_ms = busy_us / recorded_steps / 1e3
    return Idle(
        batch=batch,
        step_ms=step_ms,
        recorded_step_ms=span_us / recorded_steps / 1e3,
        busy_ms_per_step=busy_ms,
        recorded_idle=1 - busy_us / span_us,
        unrecorded_idle=1 - busy_ms / step_ms,
        kernels_per_step=len(events) / recorded_steps,
        kernels_ms=tuple(
            (name[:90], round(us / recorded_steps / 1e3, 4)) for name, us in totals.most_common(_TOP_KERNELS)
        ),
    )


def can_be_steady(workload: Workload) -> bool:
    """Whether all its requests decode at once for as long as the measurement takes."""
    steps = 2 * _SETTLE_TOKENS + _UNRECORDED_STEPS + _STARTING_STEPS + _RECORDED_STEPS
    is_short = any(request.output_tokens < steps for request in workload.requests)
    return not is_short and not workload.has_sessions and len(workload.requests) <= _MOST_SEQUENCES


def steady_decode_idle(engine: BallonetStepper, workload: Workload) -> Idle:
    """Idle share with all requests of the workload decoding at once. Cancels them at the end.

    Raises:
        RuntimeError: a request ended before the measurement did: its output is too short.
    """
    import torch

    batch = len(workload.requests)
    tokens: Counter[str] = Counter()

    def steps(count: int) -> None:
        for _ in range(count):
            engine.step()
            for gain in engine.gains():
                tokens[gain.request_id] += gain.num_tokens
                if gain.finished:
                    raise RuntimeError(f"request {gain.request_id} ended: give the workload longer outputs")

    for index, request in enumerate(workload.requests):
        engine.submit(f"idle-{index}", workload.token_ids(request), request.output_tokens)
    while len(tokens) < batch or min(tokens.values()) < _SETTLE_TOKENS:
        steps(1)
    torch.cuda.synchronize()
    started = time.perf_counter()
    steps(_UNRECORDED_STEPS)
    torch.cuda.synchronize()
    step_ms = (time.perf_counter() - started) / _UNRECORDED_STEPS * 1e3
    _record(lambda: steps(_STARTING_STEPS))  # the first recording pays for starting CUPTI
    events = _record(lambda: steps(_RECORDED_STEPS))
    for index in range(batch):
        engine.engine.cancel(f"idle-{index}")
    while engine.step():
        engine.gains()
    return idle_of(events, batch, step_ms, _RECORDED_STEPS)


def _record(work: Callable[[], None]) -> list[tuple[str, float, float]]:
    """Device events of `work` and of what it left running."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return device_events(json.loads(file.read_text()))
