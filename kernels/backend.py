"""Which implementation of the kernels a device gets. The one door of this package."""

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

import torch


class Kernels(Protocol):
    """The functions of `kernels.reference`, which documents them."""

    def kv_write(
        self,
        kv: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        first_rows: torch.Tensor,
        positions: torch.Tensor,
    ) -> None: ...

    def decode_attention(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        first_rows: torch.Tensor,
        context_lens: torch.Tensor,
        max_context_len: int,
        scale: float,
        out: torch.Tensor,
    ) -> torch.Tensor: ...

    def prefill_attention(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        query_starts: torch.Tensor,
        first_rows: torch.Tensor,
        context_lens: torch.Tensor,
        max_query_len: int,
        scale: float,
        out: torch.Tensor,
    ) -> torch.Tensor: ...

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
    ) -> torch.Tensor: ...

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
    ) -> torch.Tensor: ...

    def rotary(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
    ) -> None: ...

    def silu_and_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor: ...


def for_device(device: torch.device) -> Kernels:
    """Triton on a GPU, the PyTorch reference elsewhere. Triton is imported only where it runs."""
    name = "kernels.triton_backend" if device.type == "cuda" else "kernels.reference"
    return cast(Kernels, import_module(name))
