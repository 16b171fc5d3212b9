"""Fixtures of the unit tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.fakes import Bench


@pytest.fixture(params=[0, 1])
def steps_ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs a test with tokens read back before the next step starts, and after."""
    monkeypatch.setattr(Bench, "steps_ahead", request.param)
    return int(request.param)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Two that wait for each other beside a busy process take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
