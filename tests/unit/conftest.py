"""Fixtures of the unit tests."""

from __future__ import annotations

import pytest

from tests.fakes import Bench


@pytest.fixture(params=[0, 1])
def steps_ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs a test with tokens read back before the next step starts, and after."""
    monkeypatch.setattr(Bench, "steps_ahead", request.param)
    return int(request.param)
