"""The Triton kernels under one name: what `kernels.backend` gives a CUDA device."""

from __future__ import annotations

from kernels.activation import silu_and_mul
from kernels.decode_attention import decode_attention
from kernels.kv_write import kv_write
from kernels.norm import add_rms_norm, rms_norm
from kernels.prefill_attention import prefill_attention
from kernels.rotary import rotary

__all__ = [
    "add_rms_norm",
    "decode_attention",
    "kv_write",
    "prefill_attention",
    "rms_norm",
    "rotary",
    "silu_and_mul",
]
