"""Two models on one GPU, and a load that swings, in virtual time: the same on every machine."""

from __future__ import annotations

from dataclasses import replace

from cluster.policy import PolicyConfig
from tests.bench.shared_gpu import SWING, run


def test_lending_keeps_more_promises_than_halves_for_good() -> None:
    swing = replace(SWING, periods=1)
    static, lent = run(swing, None), run(swing, PolicyConfig())
    assert lent["requests"] == static["requests"] > 80
    assert lent["failed"] == static["failed"] == 0
    assert lent["attainment"] >= 1.1 * static["attainment"]
    assert lent["most_of_the_device"] <= 1.0
