"""Which group is best for a request. Pure."""

from __future__ import annotations

from engine.messages import EngineSnapshot


def routing_stats(snapshot: EngineSnapshot, ttft_slo_s: float) -> dict[str, float]:
    """x"""
    return {}
