"""What the router makes of conversations, beside least work and chance (`tests/simulation/routing.py`)."""

from __future__ import annotations

import statistics

import pytest

from tests.simulation.routing import Fleet, by_chance, by_slack, by_work, serve_chats


@pytest.fixture(scope="module")
def fleets() -> dict[str, Fleet]:
    routes = {"slack": by_slack, "work": by_work, "chance": by_chance}
    return {name: serve_chats(route) for name, route in routes.items()}


def test_conversations_return_to_what_is_cached(fleets: dict[str, Fleet]) -> None:
    cached = {name: fleet.cached / fleet.asked for name, fleet in fleets.items()}
    assert cached["slack"] > 0.75
    assert cached["slack"] > 1.2 * max(cached["work"], cached["chance"])
    waits = {name: statistics.mean(fleet.waits_s) for name, fleet in fleets.items()}
    assert waits["slack"] < 0.8 * min(waits["work"], waits["chance"])


def test_a_prefix_that_everybody_has_overloads_nobody(fleets: dict[str, Fleet]) -> None:
    """All of them begin with the same 1,024 tokens; yet no group computes much more than the others."""
    assert len(fleets["slack"].sent) == 8
    assert fleets["slack"].imbalance < 1.6
    hot = serve_chats(by_slack, num_chats=200, turns=1, shared_tokens=4096)
    assert len(hot.sent) >= 4, "computing it once more, 0.41 s, is worth it where the queue is as long"
    assert max(hot.sent.values()) < 2 * statistics.mean(hot.sent.values())
    assert max(hot.waits_s) < 1.5, "0.47 s at an idle group that has nothing"
