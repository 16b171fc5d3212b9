"""Tiny checkpoints of every supported family, and a KV cache to run them on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from engine.memory.arena import BufferSpec
from engine.messages import Piece, StepPlan
from engine.model.decoder import Decoder
from engine.model.runner import ModelRunner

_SIZES: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILY_MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, rope_parameters=_LLAMA3, eos_token_id=[7, 9])),
    "llama-tied": lambda: LlamaForCausalLM(
        LlamaConfig(
            **_SIZES,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        )
    ),
    "llama-biases": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_SIZES, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SIZES, head_dim=16)),
}


def tiny_model(family: str, seed: int = 0) -> Any:
    """A random model in float32 whose norms and biases are not at their neutral values."""
    torch.manual_seed(seed)
    model = FAMILY_MODELS[family]().float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            else:
                parameter.normal_(0.0, 0.15)
    return model


def save_tiny(family: str, directory: Path, **options: Any) -> Any:
    """Save a tiny model as safetensors, and return it."""
    model = tiny_model(family)
    model.save_pretrained(directory, **options)
    return model


class PlainArena:
    """Buffers from torch's allocator, filled with NaN: a pass may not read what it did not write."""

    def __init__(self, specs: tuple[BufferSpec, ...]) -> None:
        self._specs = specs

    def buffers(self, num_tokens: int, num_rows: int) -> dict[str, torch.Tensor]:
        size = num_tokens, num_rows
        return {
            spec.name: torch.full((spec.count(*size), spec.width), float("nan"), dtype=spec.dtype)
            for spec in self._specs
        }


class ScrambledKv:
    """KV slots in shuffled order over one tensor of NaN, with a row of slack between them."""

    def __init__(self, config: Any, order: tuple[int, ...], slot_tokens: int, tokens_per_row: int) -> None:
        rows_per_slot = -(-slot_tokens // tokens_per_row) + 1
        shape = (len(order) * rows_per_slot, 2, tokens_per_row, config.num_kv_heads, config.head_dim)
        self.layer_views = tuple(torch.full(shape, float("nan")) for _ in range(config.num_layers))
        self._first_rows = {slot: place * rows_per_slot for place, slot in enumerate(order)}

    def first_row(self, slot: int) -> int:
        return self._first_rows[slot]

    def copy_rows(self, source: int, target: int) -> None:
        for view in self.layer_views:
            view[target] = view[source]


def make_runner(decoder: Decoder, specs: tuple[BufferSpec, ...], kv: ScrambledKv) -> ModelRunner:
    last_tokens = torch.zeros(8, dtype=torch.int64)
    return ModelRunner(decoder, PlainArena(specs), kv, torch.device("cpu"), last_tokens, 512, 8)


def piece(slot: int, tokens: list[int], start: int, end: int, samples: bool = True) -> Piece:
    return Piece(f"request-{slot}", slot, slot, start, tuple(tokens[start:end]), samples)


def plan(*pieces: Piece) -> StepPlan:
    num_decodes = 0
    while num_decodes < len(pieces) and len(pieces[num_decodes].token_ids) == 1:
        num_decodes += 1
    return StepPlan(1, pieces, num_decodes)
