"""The architecture of a GGUF file, from its metadata and its tensor table."""

from __future__ import annotations

from typing import Any

import torch

from engine.errors import ModelLoadError
from engine.model.architecture import FAMILIES, ModelConfig, RopeConfig
from engine.model.gguf_file import GgufFile

_GGUF_FAMILIES = ("llama", "qwen2", "qwen3")


def gguf_config(file: GgufFile) -> ModelConfig:
    """The facts of a GGUF file: its metadata, and which tensors it has."""
    meta, tensors = file.metadata, file.tensors
    arch = meta.get("general.architecture")
    if arch not in _GGUF_FAMILIES or meta.get(f"{arch}.expert_count"):
        kind = f"{arch} with experts" if meta.get(f"{arch}.expert_count") else arch
        raise ModelLoadError(
            f"{file.path} is of architecture {kind}; supported are {', '.join(_GGUF_FAMILIES)}"
        )
    try:
        heads = meta[f"{arch}.attention.head_count"]
        hidden = meta[f"{arch}.embedding_length"]
        head_dim = meta.get(f"{arch}.attention.key_length", hidden // heads)
        return ModelConfig(
            family=FAMILIES[arch],
            vocab_size=tensors["token_embd.weight"].shape[0],
            hidden_size=hidden,
            intermediate_size=meta[f"{arch}.feed_forward_length"],
            num_layers=meta[f"{arch}.block_count"],
            num_heads=heads,
            num_kv_heads=meta.get(f"{arch}.attention.head_count_kv", heads),
            head_dim=head_dim,
            rms_norm_eps=meta[f"{arch}.attention.layer_norm_rms_epsilon"],
            max_position_embeddings=meta[f"{arch}.context_length"],
            rope=_gguf_rope(file, arch, head_dim),
            attention_bias="blk.0.attn_q.bias" in tensors,
            output_bias="blk.0.attn_output.bias" in tensors,
            mlp_bias="blk.0.ffn_gate.bias" in tensors,
            qk_norm="blk.0.attn_q_norm.weight" in tensors,
            tie_word_embeddings="output.weight" not in tensors,
            sliding_window=meta.get(f"{arch}.attention.sliding_window"),
            eos_token_ids=_gguf_eos(meta),
            dtype=torch.bfloat16,
        )
    except KeyError as error:
        raise ModelLoadError(f"{file.path} lacks {error.args[0]}: it is not a complete model") from error


def _gguf_eos(meta: dict[str, Any]) -> tuple[int, ...]:
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    return tuple(sorted({meta[key] for key in keys if key in meta}))


def _gguf_rope(file: GgufFile, arch: str, head_dim: int) -> RopeConfig:
    meta = file.metadata
    theta = meta.get(f"{arch}.rope.freq_base", 10000.0)
    if meta.get(f"{arch}.rope.dimension_count", head_dim) != head_dim:
        raise ModelLoadError(f"{file.path} rotates only a part of each head (rope.dimension_count)")
    kind = meta.get(f"{arch}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ModelLoadError(
            f"{file.path} scales its rotary embedding as {kind!r}; supported are linear and llama3"
        )
    if "rope_freqs.weight" in file.tensors:
        divisors = tuple(file.read("rope_freqs.weight").reshape(-1).tolist())
        if len(divisors) != head_dim // 2:
            raise ModelLoadError(
                f"rope_freqs.weight of {file.path} has {len(divisors)} values, not {head_dim // 2}"
            )
        return RopeConfig(theta, "divisors", divisors=divisors)
    if kind == "linear":
        return RopeConfig(theta, "linear", meta[f"{arch}.rope.scaling.factor"])
    return RopeConfig(theta)
