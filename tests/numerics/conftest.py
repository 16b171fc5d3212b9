"""Which implementation a numerics test runs, and where: every test meets both backends.

The reference runs on the CPU; Triton runs natively on a GPU, and in its interpreter without one.
"""

from __future__ import annotations

import pytest
import torch

from kernels import prefill_attention, reference, triton_backend
from kernels.backend import Kernels
from tests.numerics.cases import Backend


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton runs here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest, device: torch.device) -> Backend:
    """One implementation of the kernels and its device."""
    kernels: Kernels
    if request.param == "reference":
        kernels, where = reference, torch.device("cpu")
    else:
        kernels, where = triton_backend, device
    return Backend(kernels, where)


@pytest.fixture
def on_hopper(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips on other GPUs, and lets nothing pass through the portable kernel."""
    if torch.cuda.get_device_capability(device)[0] != 9:
        pytest.skip("not a Hopper GPU")

    def refuse(*_: object) -> None:
        raise AssertionError("the portable kernel was chosen")

    monkeypatch.setattr(prefill_attention, "_prefill_portable", refuse)


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Fresh inputs for every test, the same in every run."""
    torch.manual_seed(sum(request.node.name.encode()))
