"""Which activation buffers one forward pass needs, so that the pool knows its bytes beforehand."""

from __future__ import annotations

import torch

from engine.memory.arena import BufferSpec
from engine.model.architecture import ModelConfig
from kernels.backend import Kernels


def activation_specs(config: ModelConfig, dtype: torch.dtype, kernels: Kernels) -> tuple[BufferSpec, ...]:
    """The buffers `Decoder.forward` takes, by name.

    Buffers of one stage are alive together: attention, then the MLP, layer after layer; the head
    after the last layer.
    """
    workspace = kernels.decode_workspace_floats(config.num_heads, config.num_kv_heads, config.head_dim)
    qkv_size = config.q_size + 2 * config.kv_size
    return (
        BufferSpec("hidden", config.hidden_size, dtype, "token"),
        BufferSpec("residual", config.hidden_size, dtype, "token"),
        BufferSpec("qkv", qkv_size, dtype, "token", "attention"),
        BufferSpec("attention", config.q_size, dtype, "token", "attention"),
        BufferSpec("workspace", workspace, torch.float32, "step"),
        BufferSpec("gate_up", 2 * config.intermediate_size, dtype, "token", "mlp"),
        BufferSpec("activated", config.intermediate_size, dtype, "token", "mlp"),
        BufferSpec("sampled_hidden", config.hidden_size, dtype, "row", "head"),
        BufferSpec("logits", config.vocab_size, dtype, "row", "head"),
    )
