"""What of a device's memory is not the pool's, worked out from what the driver and torch say.

`torch.cuda` is a module, so its three questions are replaced there: no constructor takes them.
"""

from __future__ import annotations

import pytest
import torch

from engine.footprint import Footprint
from engine.messages import MemorySnapshot
from tests.unit.samples import MEMORY

MIB = 1 << 20
LOOKS = 600  # snapshots: more than between two looks at torch


class Card:
    """A device of 1000 MiB.

    Attributes:
        used: bytes that somebody holds, torch's included.
        cached: of torch's, those it keeps for later.
        reserved: all of torch's.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.used = self.cached = self.reserved = 0
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000 * MIB - self.used, 1000 * MIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: self.reserved)
        monkeypatch.setattr(torch.cuda, "empty_cache", self._empty_cache)

    def torch_takes(self, mib: int, is_cached: bool = False) -> None:
        self.used += mib * MIB
        self.reserved += mib * MIB
        self.cached += mib * MIB * is_cached

    def others_take(self, mib: int) -> None:
        self.used += mib * MIB

    def _empty_cache(self) -> None:
        self.used -= self.cached
        self.reserved -= self.cached
        self.cached = 0


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    return Card(monkeypatch)


@pytest.fixture
def started(card: Card) -> Footprint:
    """500 MiB of weights, 30 of graphs, 200 of chunks and 45 of workspaces, 20 of them not torch's."""
    footprint = Footprint(torch.device("cuda", 0))
    card.torch_takes(500 + 30 + 25)
    card.others_take(200 + 20)
    footprint.started(500 * MIB, 30 * MIB, 200 * MIB)
    return footprint


def outside(footprint: Footprint) -> tuple[int, int, int]:
    """MiB of weights, graphs and workspaces, after a look at torch."""
    told = [footprint.describe(MEMORY) for _ in range(LOOKS)][-1]
    return told.weight_bytes // MIB, told.graph_bytes // MIB, told.workspace_bytes // MIB


def test_what_is_neither_weights_nor_graphs_nor_chunks_is_workspace(started: Footprint) -> None:
    assert outside(started) == (500, 30, 45)


def test_the_chunks_are_told_as_they_were(started: Footprint) -> None:
    told = started.describe(MEMORY)
    for name in MemorySnapshot.__slots__:
        if name not in ("weight_bytes", "graph_bytes", "workspace_bytes"):
            assert getattr(told, name) == getattr(MEMORY, name)


def test_what_torch_takes_later_is_workspace(card: Card, started: Footprint) -> None:
    assert outside(started) == (500, 30, 45)
    card.torch_takes(12)
    assert outside(started) == (500, 30, 57)
    card.torch_takes(-7)
    assert outside(started) == (500, 30, 50)
    card.torch_takes(-100)
    assert outside(started)[2] == 0, "never negative"
    card.torch_takes(107)
    assert outside(started) == (500, 30, 57), "and nothing is forgotten over that"


def test_what_the_pool_or_another_process_takes_later_is_not_ours(card: Card, started: Footprint) -> None:
    card.others_take(150)
    assert outside(started) == (500, 30, 45)


def test_what_torch_keeps_for_later_goes_back_on_a_trim(card: Card, started: Footprint) -> None:
    card.torch_takes(60, is_cached=True)
    assert outside(started) == (500, 30, 105)
    started.release_unused()
    assert card.cached == 0
    assert started.describe(MEMORY).workspace_bytes == 45 * MIB, "told at once"


def test_torch_is_asked_now_and_then_only(card: Card, started: Footprint) -> None:
    """Asking takes as long as a good part of a step."""
    started.describe(MEMORY)
    card.torch_takes(12)
    assert started.describe(MEMORY).workspace_bytes == 45 * MIB
    assert outside(started)[2] == 57


def test_the_bytes_of_some_work_leave_out_chunks_and_what_torch_kept_before(card: Card) -> None:
    footprint = Footprint(torch.device("cuda", 0))
    card.torch_takes(40, is_cached=True)  # of the time before: work may take it over
    pool = 100 * MIB

    def work() -> None:
        nonlocal pool
        card.torch_takes(8)
        card.torch_takes(5, is_cached=True)  # temporaries
        card.others_take(32)
        pool += 32 * MIB

    assert footprint.bytes_of(work, lambda: pool) == 8 * MIB
    assert footprint.bytes_of(lambda: card.torch_takes(-3), lambda: pool) == 0, "never negative"


def test_on_a_cpu_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mem_get_info", "memory_reserved", "empty_cache"):
        monkeypatch.delattr(torch.cuda, name)
    footprint, done = Footprint(torch.device("cpu")), []
    assert footprint.bytes_of(lambda: done.append(1), lambda: 0) == 0
    assert done == [1]
    footprint.started(7 * MIB, 0, 100 * MIB)
    footprint.release_unused()
    assert outside(footprint) == (7, 0, 0)
