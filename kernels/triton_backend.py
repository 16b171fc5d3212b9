"""The Triton kernels under one name: what `kernels.backend` gives a CUDA device."""

from __future__ import annotations

from kernels.activation import silu_and_mul
from kernels.decode_attention import decode_attention
from kernels.decode_plan import decode_plan, decode_workspace_floats
from kernels.host_copy import copy_words
from kernels.norm import add_rms_norm, rms_norm
from kernels.prefill_attention import prefill_attention
from kernels.rotary_kv_write import rotary_and_kv_write
from kernels.sampling import sample, sampling_workspace
from kernels.sampling_adjust import adjust_logits
from kernels.skinny_matmul import skinny_matmul

__all__ = [
    "add_rms_norm",
    "adjust_logits",
    "copy_words",
    "decode_attention",
    "decode_plan",
    "decode_workspace_floats",
    "prefill_attention",
    "rms_norm",
    "rotary_and_kv_write",
    "sample",
    "sampling_workspace",
    "silu_and_mul",
    "skinny_matmul",
]
