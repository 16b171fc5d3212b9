"""Which implementation of the kernels a device gets. The one door of this package."""

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

import torch

from kernels.sampling_record import Filters


class Kernels(Protocol):
    """The functions of `kernels.reference`, which documents them."""

    def rotary_and_kv_write(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        positions: torch.Tensor,
        kv: torch.Tensor,
        first_rows: torch.Tensor,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
    ) -> None: ...

    def decode_workspace_floats(self, query_heads: int, kv_heads: int, head_dim: int) -> int: ...

    def decode_plan(self, kv: torch.Tensor, context_lens: torch.Tensor, workspace: torch.Tensor) -> None: ...

    def decode_attention(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        first_rows: torch.Tensor,
        shared_first_rows: torch.Tensor,
        shared_lens: torch.Tensor,
        context_lens: torch.Tensor,
        scale: float,
        workspace: torch.Tensor,
        out: torch.Tensor,
    ) -> torch.Tensor: ...

    def prefill_attention(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        query_starts: torch.Tensor,
        first_rows: torch.Tensor,
        shared_first_rows: torch.Tensor,
        shared_lens: torch.Tensor,
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

    def skinny_matmul(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> torch.Tensor: ...

    def silu_and_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor: ...

    def copy_words(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor: ...

    def sampling_workspace(
        self, num_rows: int, vocab_size: int, device: torch.device
    ) -> tuple[torch.Tensor, ...]: ...

    def adjust_logits(
        self,
        logits: torch.Tensor,
        records: torch.Tensor,
        edits: torch.Tensor,
        counts: torch.Tensor,
        out: torch.Tensor,
    ) -> torch.Tensor: ...

    def sample(
        self,
        logits: torch.Tensor,
        records: torch.Tensor,
        filters: Filters,
        counts: torch.Tensor,
        last_tokens: torch.Tensor,
        results: torch.Tensor,
        workspace: tuple[torch.Tensor, ...],
    ) -> None: ...


def for_device(device: torch.device) -> Kernels:
    """Triton on a GPU, the PyTorch reference elsewhere. Triton is imported only where it runs."""
    name = "kernels.triton_backend" if device.type == "cuda" else "kernels.reference"
    return cast(Kernels, import_module(name))
