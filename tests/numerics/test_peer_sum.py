"""Sums through the ranks' memory: every rank gets the same, and waits for the others as it must."""

from __future__ import annotations

import pytest
import torch

from kernels.peer_sum import PeerParts, sum_add_rms_norm
from tests.numerics import oracle
from tests.numerics.cases import DTYPES, assert_close, poisoned_like, random, strided

EPS = 1e-5
LAST_EPOCH = 2**31 - 1


class Ranks:
    """The memory of several ranks, on one device."""

    def __init__(
        self, device: torch.device, size: int, rows: int, width: int, dtype: torch.dtype, epoch: int = 0
    ) -> None:
        self.parts = [random(rows, width, dtype=dtype, device=device) for _ in range(size)]
        self.flags = [torch.full((rows, size), epoch, dtype=torch.int32, device=device) for _ in range(size)]
        addresses, flags = (
            torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64, device=device)
            for tensors in (self.parts, self.flags)
        )
        self.views = [
            PeerParts(part, addresses, flags, torch.full_like(self.flags[0][:, 0], epoch), rank, size)
            for rank, part in enumerate(self.parts)
        ]

    def sum_in_turn(
        self, residual: torch.Tensor, weight: torch.Tensor, has_residual: bool = True
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(residual, normed) of each rank, one after the other: what a later one tells is written before."""
        found = []
        for rank, view in enumerate(self.views):
            self.flags[rank][: residual.shape[0], rank + 1 :] += 1
            own, out = strided(residual), strided(poisoned_like(residual), extra=32)
            assert sum_add_rms_norm(view, own, weight, EPS, out, has_residual) is out
            found.append((own, out))
        return found


@pytest.mark.parametrize("has_residual", [True, False], ids=["add", "begin"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_rank_gets_the_sum(
    device: torch.device, size: int, dtype: torch.dtype, has_residual: bool
) -> None:
    ranks = Ranks(device, size, 3, 576, dtype)
    residual = random(3, 576, dtype=dtype, device=device)
    weight = random(576, dtype=dtype, device=device)
    total = torch.stack(ranks.parts).double().sum(0)
    total = (total + residual.double() if has_residual else total).cpu()
    found = ranks.sum_in_turn(residual, weight, has_residual)
    for own, out in found:
        assert_close(own, total)
        assert_close(out, oracle.rms_norm(own, weight, EPS))
        assert torch.equal(own, found[0][0])
        assert torch.equal(out, found[0][1])


def test_one_sum_after_another(device: torch.device) -> None:
    """Of fewer rows than there is room for, and past the largest number that flags hold."""
    ranks = Ranks(device, 2, 4, 64, torch.float32, epoch=LAST_EPOCH - 1)
    residual, weight = torch.zeros(3, 64, device=device), torch.ones(64, device=device)
    for _ in range(3):
        for part in ranks.parts:
            part.normal_()
        for own, _ in ranks.sum_in_turn(residual, weight):
            assert_close(own, (ranks.parts[0] + ranks.parts[1])[:3].double().cpu())
    begun = LAST_EPOCH - 1
    for view, flags in zip(ranks.views, ranks.flags, strict=True):
        assert view.epochs.tolist() == [-(2**31) + 1] * 3 + [begun]
        assert flags[3].tolist() == [begun, begun]


def test_arguments(device: torch.device) -> None:
    view = Ranks(device, 2, 2, 64, torch.float32).views[0]
    weight = torch.ones(64, device=device)
    for rows, width, named in ((3, 64, "part"), (2, 32, "part|weight")):
        residual = torch.zeros(rows, width, device=device)
        with pytest.raises(ValueError, match=named):
            sum_add_rms_norm(view, residual, weight, EPS, torch.empty_like(residual))
    nothing = torch.empty(0, 64, device=device)
    assert sum_add_rms_norm(view, nothing, weight, EPS, nothing) is nothing


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64, 1000])
def test_ranks_at_the_same_time_wait_for_one_another(device: torch.device, rows: int) -> None:
    """Many sums on two streams, of parts that each rank writes when it has read the sum before."""
    places = [Ranks(device, 2, rows, 4096, torch.float32) for _ in range(2)]
    weight = torch.ones(4096, device=device)
    residuals = [torch.zeros(rows, 4096, device=device) for _ in range(2)]
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    torch.cuda.synchronize(device)
    for number in range(40):
        for rank, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                place = places[number % 2]
                place.parts[rank].fill_((rank + 1) * number)
                out = torch.empty_like(residuals[rank])
                sum_add_rms_norm(place.views[rank], residuals[rank], weight, EPS, out)
    torch.cuda.synchronize(device)
    for residual in residuals:
        assert torch.equal(residual, torch.full_like(residual, 3 * sum(range(40))))
