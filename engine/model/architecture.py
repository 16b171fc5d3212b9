"""The facts of one model's architecture, wherever they were read from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from engine.errors import ModelLoadError

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        factor: of `linear` and `llama3`.
        low_freq_factor, high_freq_factor, original_max_positions: of `llama3`.
        divisors: one a frequency, of `divisors`: GGUF files carry llama3 scaling in this form.
    """

    theta: float = 10000.0
    scaling: Literal["default", "linear", "llama3", "divisors"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    divisors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The architecture of one checkpoint.

    Attributes:
        family: the architecture's name in transformers.
        attention_bias: whether the q, k and v projections have a bias.
        qk_norm: whether each head's queries and keys are normalised before the rotation (Qwen3).
        sliding_window: tokens a position attends to, where some layer has such a limit.
        eos_token_ids: ids that end a sequence; empty if the checkpoint names none.
        dtype: of the checkpoint; float32 if it names none, bfloat16 for GGUF.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    sliding_window: int | None
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ModelLoadError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key and value heads"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ModelLoadError(f"head_dim must be even for rotary embedding, not {self.head_dim}")

    @property
    def max_context(self) -> int:
        """Tokens of the longest sequence whose attention is exact.

        Attention here is over the whole context. Up to the sliding window that is the same.
        """
        if self.sliding_window is None:
            return self.max_position_embeddings
        return min(self.max_position_embeddings, self.sliding_window)

    @property
    def q_size(self) -> int:
        """Elements of one token's queries."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of one token's keys, and of its values."""
        return self.num_kv_heads * self.head_dim
