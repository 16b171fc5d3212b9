"""Words to the device and back, at counts around a program's block; on a GPU from and to pinned memory."""

from __future__ import annotations

import pytest
import torch

from kernels import triton_backend
from tests.numerics.cases import Backend


def host(count: int, device: torch.device) -> torch.Tensor:
    return torch.empty(count, dtype=torch.int32, pin_memory=device.type == "cuda")


@pytest.mark.parametrize("count", [0, 1, 511, 512, 513, 5000])
def test_words_arrive_and_come_back(backend: Backend, count: int) -> None:
    sent, back = host(count, backend.device), host(count, backend.device).fill_(-1)
    sent.random_(-(2**31), 2**31 - 1)
    there = torch.full((count + 3,), 7, dtype=torch.int32, device=backend.device)
    first = there[:count]
    assert backend.kernels.copy_words(sent, first) is first
    assert backend.kernels.copy_words(there[:count], back) is back
    if backend.device.type == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(back, sent)
    assert there[count:].tolist() == [7, 7, 7]


def test_rows_are_words_too(backend: Backend) -> None:
    there = torch.arange(12, dtype=torch.int32, device=backend.device).view(6, 2)
    back = host(12, backend.device).view(6, 2)
    backend.kernels.copy_words(there[:4], back[:4])
    if backend.device.type == "cuda":
        torch.cuda.synchronize()
    assert back[:4].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.gpu
def test_results_pass_copies_of_the_copy_engine(device: torch.device) -> None:
    """Behind 1 GiB on its way to the host, a result of 8 bytes took 20 ms where the engine copied it."""
    large, on_host = torch.empty(1 << 28, device=device), torch.empty(1 << 28, pin_memory=True)
    result, back = torch.ones(2, dtype=torch.int32, device=device), host(2, device).fill_(0)
    triton_backend.copy_words(result, back)  # compiled
    beside = torch.cuda.Stream(device)
    torch.cuda.synchronize()
    with torch.cuda.stream(beside):
        on_host.copy_(large, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
    triton_backend.copy_words(result, back)
    torch.cuda.current_stream().synchronize()
    was_first = not done.query()
    torch.cuda.synchronize()
    assert was_first
    assert back.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("name", "dtype", "count", "stride"),
    [
        ("source", torch.int64, 4, 1),
        ("target", torch.float32, 4, 1),
        ("target", torch.int32, 5, 1),
        ("source", torch.int32, 4, 2),
    ],
)
def test_the_wrong_argument_is_named(
    name: str, dtype: torch.dtype, count: int, stride: int, device: torch.device
) -> None:
    arguments = {at: torch.zeros(4, dtype=torch.int32, device=device) for at in ("source", "target")}
    arguments[name] = torch.zeros(count * stride, dtype=dtype, device=device)[::stride]
    with pytest.raises(ValueError, match=rf"^{name} must be "):
        triton_backend.copy_words(**arguments)
