"""Two groups on one node, and a load that swings: the controller against an equal division for good.

The real scheduler, pool, balloon and `decide`, in virtual time: the same on every machine.
"""

from __future__ import annotations

from typing import Any

import pytest

from cluster.policy import PolicyConfig
from tests.bench.swinging_load import GIB, SIMULATED, furthest_behind, run, simulated_parties


def _run(config: PolicyConfig | None, is_balanced: bool) -> dict[str, Any]:
    return run(simulated_parties(SIMULATED, is_balanced), SIMULATED, config, furthest_behind)


@pytest.fixture(scope="module")
def swinging() -> dict[str, dict[str, Any]]:
    return {"static": _run(None, False), "controlled": _run(PolicyConfig(), False)}


def test_half_as_many_promises_more_are_kept(swinging: dict[str, dict[str, Any]]) -> None:
    assert swinging["controlled"]["requests"] == swinging["static"]["requests"] > 200
    assert swinging["controlled"]["attainment"] >= 1.5 * swinging["static"]["attainment"]


def test_the_node_is_never_promised_twice(swinging: dict[str, dict[str, Any]]) -> None:
    assert swinging["controlled"]["most_host_gib"] <= SIMULATED.host_bytes / GIB
    assert swinging["controlled"]["moves"] > 0


def test_a_balanced_load_loses_nothing() -> None:
    assert _run(PolicyConfig(), True)["attainment"] >= _run(None, True)["attainment"]
