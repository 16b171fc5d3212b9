"""Snapshots with plausible figures, and a metric backend that remembers."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.metrics import Metric
from engine.messages import EngineSnapshot, MemorySnapshot

MEMORY = MemorySnapshot(
    chunk_bytes=1 << 20,
    total=100,
    free=60,
    kv=20,
    cached=5,
    activation=10,
    guard=2,
    retiring=3,
    warm=20,
    created=80,
    kv_tokens=400,
    driver_calls=90,
    driver_calls_beside=40,
    limit=90,
    configured=100,
    floor=10,
    balloon=6,
    balloon_cached=4,
    balloon_logical=20,
    balloon_physical=30,
    copied_out_bytes=9 << 20,
    copied_in_bytes=5 << 20,
    weight_bytes=7 << 20,
    graph_bytes=3 << 20,
    workspace_bytes=1 << 20,
)


def snapshot(model_id: str, scale: int = 1) -> EngineSnapshot:
    """`scale` multiplies every counter."""
    return EngineSnapshot(
        model_id=model_id,
        monotonic_s=1.0,
        num_waiting=3,
        num_running=4,
        num_steps=50 * scale,
        num_preemptions=2 * scale,
        prompt_tokens=300 * scale,
        generated_tokens=200 * scale,
        finished=(("stop", 5), ("length", 1)),
        last_step_s=0.02,
        memory=MEMORY,
        prefix_queries=300 * scale,
        prefix_hits=100 * scale,
        num_parked=2,
        num_parkings=6 * scale,
        num_deposited=11,
        expected_ttft_s=0.25,
        decisions=(("park_for_prompt", 4 * scale), ("return", 5 * scale)),
    )


class RecordingBackend:
    """A `cluster.metrics.MetricBackend` for assertions."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Metric, float, dict[str, str]]] = []

    def inc(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        self.calls.append(("counter", metric, value, dict(labels)))

    def set(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        self.calls.append(("gauge", metric, value, dict(labels)))

    def observe(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        self.calls.append(("histogram", metric, value, dict(labels)))

    def values(self, name: str) -> list[float]:
        return [value for _, metric, value, _ in self.calls if metric.name == name]

    def last(self, name: str) -> float:
        return self.values(name)[-1]

    def total(self, name: str) -> float:
        return sum(self.values(name))
