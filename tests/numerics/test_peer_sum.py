"""Sums through the ranks' memory: every rank gets the same, and waits for the others as it must."""

from __future__ import annotations

import pytest
import torch

from kernels.peer_sum import PeerRoom, clear, sum_add_rms_norm
from tests.numerics import oracle
from tests.numerics.cases import DTYPES, assert_close, poisoned_like, random, strided

EPS = 1e-5


class Ranks:
    """The memory of several ranks, on one device."""

    def __init__(self, device: torch.device, size: int, rows: int, width: int, dtype: torch.dtype) -> None:
        self.memory = [torch.empty(size, rows, width, dtype=dtype, device=device) for _ in range(size)]
        for memory in self.memory:
            clear(memory)
        addresses = torch.tensor(
            [memory.data_ptr() for memory in self.memory], dtype=torch.int64, device=device
        )
        self.rooms = [PeerRoom(addresses, rows, width, dtype, rank, size) for rank in range(size)]

    def sum_in_turn(
        self,
        parts: list[torch.Tensor],
        residual: torch.Tensor,
        weight: torch.Tensor,
        has_residual: bool = True,
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(residual, normed) of each rank, one after the other: what later ones send is written before."""
        found = []
        for rank, room in enumerate(self.rooms):
            for later in range(rank + 1, len(self.rooms)):
                self.memory[rank][later, : residual.shape[0]] = parts[later] + 0.0  # no negative zero
            own, out = strided(residual), strided(poisoned_like(residual), extra=32)
            assert sum_add_rms_norm(room, parts[rank], own, weight, EPS, out, has_residual) is out
            found.append((own, out))
        for rank in range(len(self.rooms) - 1):  # what those that ran later sent again
            clear(self.memory[rank])
        return found


@pytest.mark.parametrize("has_residual", [True, False], ids=["add", "begin"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_rank_gets_the_sum(
    device: torch.device, size: int, dtype: torch.dtype, has_residual: bool
) -> None:
    ranks = Ranks(device, size, 4, 576, dtype)
    parts = [strided(random(3, 576, dtype=dtype, device=device)) for _ in range(size)]
    residual = random(3, 576, dtype=dtype, device=device)
    weight = random(576, dtype=dtype, device=device)
    total = torch.stack(parts).double().sum(0)
    total = (total + residual.double() if has_residual else total).cpu()
    found = ranks.sum_in_turn(parts, residual, weight, has_residual)
    for own, out in found:
        assert_close(own, total)
        assert_close(out, oracle.rms_norm(own, weight, EPS))
        assert torch.equal(own, found[0][0])
        assert torch.equal(out, found[0][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_was_read_is_free_again(device: torch.device, dtype: torch.dtype) -> None:
    ranks = Ranks(device, 2, 4, 64, dtype)
    empty = ranks.memory[1].clone()
    parts = [random(3, 64, dtype=dtype, device=device) for _ in range(2)]
    ranks.sum_in_turn(parts, torch.zeros(3, 64, dtype=dtype, device=device), torch.ones_like(parts[0][0]))
    assert torch.equal(ranks.memory[1].view(torch.uint8), empty.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_negative_zeros_are_no_absence(device: torch.device, dtype: torch.dtype) -> None:
    """They stand for what has not come. NaN and infinity are values like others."""
    ranks = Ranks(device, 2, 1, 16, dtype)
    values = torch.tensor([-0.0, 0.0, torch.nan, torch.inf] * 4, dtype=dtype, device=device)[None]
    residual, weight = torch.zeros_like(values), torch.ones_like(values[0])
    for own, _ in ranks.sum_in_turn([values, values], residual, weight):
        assert own.tolist()[0][:2] == [0.0, 0.0]
        assert own[0, 2].isnan()
        assert own[0, 3] == torch.inf


@pytest.mark.parametrize("of_residual", [True, False], ids=["residual", "out"])
def test_in_place(device: torch.device, of_residual: bool) -> None:
    """The part may be where the result goes."""
    ranks = Ranks(device, 2, 2, 64, torch.float32)
    parts = [random(2, 64, dtype=torch.float32, device=device) for _ in range(2)]
    ranks.memory[0][1] = parts[1]
    residual, out = torch.zeros(2, 64, device=device), torch.zeros(2, 64, device=device)
    own = residual if of_residual else out
    own.copy_(parts[0])
    weight = torch.ones(64, device=device)
    sum_add_rms_norm(ranks.rooms[0], own, residual, weight, EPS, out, has_residual=not of_residual)
    assert_close(residual, (parts[0] + parts[1]).double().cpu())
    assert_close(out, oracle.rms_norm(residual, weight, EPS))


def test_arguments(device: torch.device) -> None:
    room = Ranks(device, 2, 2, 64, torch.float32).rooms[0]
    for rows, width, dtype in ((3, 64, torch.float32), (2, 32, torch.float32), (2, 64, torch.float16)):
        given = torch.zeros(rows, width, device=device, dtype=dtype)
        with pytest.raises(ValueError, match="room"):
            sum_add_rms_norm(room, given, given, torch.ones_like(given[0]), EPS, given)
    nothing, weight = torch.empty(0, 64, device=device), torch.ones(64, device=device)
    assert sum_add_rms_norm(room, nothing, nothing, weight, EPS, nothing) is nothing
    with pytest.raises(ValueError, match="part"):
        sum_add_rms_norm(room, nothing, torch.zeros(2, 64, device=device), weight, EPS, nothing)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64, 1000])
def test_ranks_at_the_same_time_wait_for_one_another(device: torch.device, rows: int) -> None:
    """Many sums on two streams: none reads what belongs to another, none stays behind."""
    places = [Ranks(device, 2, rows, 4096, torch.float32) for _ in range(2)]
    weight = torch.ones(4096, device=device)
    residuals = [torch.zeros(rows, 4096, device=device) for _ in range(2)]
    parts = [torch.zeros(rows, 4096, device=device) for _ in range(2)]
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    torch.cuda.synchronize(device)
    for number in range(40):
        for rank, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                parts[rank].fill_((rank + 1) * number)
                room = places[number % 2].rooms[rank]
                sum_add_rms_norm(room, parts[rank], residuals[rank], weight, EPS, parts[rank])
    torch.cuda.synchronize(device)
    for residual in residuals:
        assert torch.equal(residual, torch.full_like(residual, 3 * sum(range(40))))
