"""Which activation buffers one forward pass needs, so that the pool knows its bytes beforehand."""

from __future__ import annotations

import torch

from engine.memory.arena import BufferSpec
from engine.model.shard import Shard
from kernels.backend import Kernels


def activation_specs(shard: Shard, dtype: torch.dtype, kernels: Kernels) -> tuple[BufferSpec, ...]:
    """The buffers `Decoder.forward` takes, by name; the same bytes on every rank.

    Buffers of one stage are alive together: attention, then the MLP, layer after layer; the head
    after the last layer.
    """
    config = shard.local
    workspace = kernels.decode_workspace_floats(config.num_heads, config.num_kv_heads, config.head_dim)
    qkv_size = config.q_size + 2 * config.kv_size
    specs = (
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
    if shard.size == 1:
        return specs
    return (
        *specs,
        BufferSpec("logits_part", shard.tokens.size, dtype, "row", "head"),
        BufferSpec("logits_parts", shard.size * shard.tokens.size, dtype, "row", "head"),
    )
