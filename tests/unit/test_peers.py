"""Ranks agree on whether they sum through one another's memory, and on where it is."""

from __future__ import annotations

import itertools
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from engine.errors import DriverError
from engine.memory.cuda_peers import HANDLE_BYTES
from engine.model.peers import Peers, find_peers
from engine.model.sums import Collective, OneRank, Place, Summing, ThroughPeers
from kernels import reference
from tests.unit.tp_cases import ThreadGroup

CPU = torch.device("cpu")
WIDTH, EPS = 64, 1e-5


class HostMemory:
    """What one rank shares, in one process. Its handle is its address."""

    def __init__(self, device: torch.device, nbytes: int, can_open: bool = True) -> None:
        self.memory = torch.full((nbytes,), 7, dtype=torch.uint8)
        self.address = self.memory.data_ptr()
        self.handle = self.address.to_bytes(HANDLE_BYTES, "little")
        self.is_freed = False
        self._can_open = can_open

    def view(self) -> torch.Tensor:
        return self.memory

    def open(self, handle: bytes) -> int:
        if not self._can_open:
            raise DriverError("cuIpcOpenMemHandle", "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED")
        return int.from_bytes(handle, "little")

    def free(self) -> None:
        self.is_freed = True


def refuse(device: torch.device, nbytes: int) -> HostMemory:
    raise DriverError("cuMemAlloc", "CUDA_ERROR_OUT_OF_MEMORY")


def found_by(
    size: int, refuses_at: int | None = None, closed_at: int | None = None, max_tokens: int = 10
) -> tuple[list[Peers | None], dict[int, HostMemory]]:
    """What each rank finds, and the memory that each made."""
    store = Path(tempfile.mkdtemp()) / "store"
    made: dict[int, HostMemory] = {}

    def be(rank: int) -> Peers | None:
        def make(device: torch.device, nbytes: int) -> HostMemory:
            if rank == refuses_at:
                return refuse(device, nbytes)
            made[rank] = HostMemory(device, nbytes, can_open=rank != closed_at)
            return made[rank]

        ranks = ThreadGroup(rank, size, store, CPU)
        return find_peers(ranks, CPU, Place, max_tokens, WIDTH, torch.float32, make)  # type: ignore[arg-type]

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(be, range(size))), made


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_knows_where_all_are(size: int) -> None:
    found, made = found_by(size)
    nothing = torch.iinfo(torch.int32).min
    for rank, peers in enumerate(found):
        assert peers is not None
        assert peers.max_tokens == 10
        begins = [room.addresses.tolist() for room in peers._rooms]
        assert begins[0] == [made[one].address for one in range(size)]
        ends = [begin + size * 10 * WIDTH * 4 for begin in begins[-1]]
        assert ends[rank] <= made[rank].address + made[rank].memory.numel()
        assert all(
            later[0] - earlier[0] >= size * 10 * WIDTH * 4 for earlier, later in itertools.pairwise(begins)
        )
        assert {begin % 16 for place in begins for begin in place} == {0}
        assert made[rank].memory.view(torch.int32).eq(nothing).all(), "no part is there yet"


def test_there_is_room_for_no_more_than_pays() -> None:
    (peers, *_), _ = found_by(2, max_tokens=1 << 20)
    assert peers is not None
    assert peers.max_tokens == (16 << 20) // (WIDTH * 4)
    (peers, *_), _ = found_by(3, max_tokens=1 << 20)
    assert peers is not None
    assert peers.max_tokens == (8 << 20) // (WIDTH * 4)


@pytest.mark.parametrize(("refuses_at", "closed_at"), [(1, None), (0, None), (None, 0), (None, 2)])
def test_all_sum_in_one_way(refuses_at: int | None, closed_at: int | None) -> None:
    """One rank that cannot is enough, and what was made goes back."""
    found, made = found_by(3, refuses_at, closed_at)
    assert found == [None] * 3
    assert all(memory.is_freed for memory in made.values())


def test_long_steps_go_another_way() -> None:
    (peers, _), _ = found_by(2)
    ranks = ThreadGroup(0, 1, Path("nowhere"), CPU)
    summing = Summing(reference, EPS, ranks, peers)  # type: ignore[arg-type]
    assert isinstance(summing.of(10), ThroughPeers)
    assert isinstance(summing.of(11), Collective)
    assert isinstance(Summing(reference, EPS, ranks, None).of(1), Collective)  # type: ignore[arg-type]
    alone = Summing(reference, EPS, None, None).of(1)  # type: ignore[arg-type]
    assert isinstance(alone, OneRank)
    assert not isinstance(alone, Collective)
