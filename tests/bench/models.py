"""The models that benchmarks run: Llama-3.1-8B's shape with random weights, and the CPU demo model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.config import MIB, EngineConfig, MemoryConfig, ModelSource, SchedulerConfig

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "torch_dtype": "bfloat16",
    "eos_token_id": [128001, 128009],
    "tie_word_embeddings": False,
}
DEMO_MODEL = Path.home() / ".cache" / "ballonet" / "SmolLM2-135M-Instruct.Q4_1.gguf"
MODELS = ("llama-8b", "demo")


def write_llama_8b(folder: Path) -> Path:
    """A directory that has the shape and no weights: what `load_format="dummy"` needs."""
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return folder


def engine_config(model: str, folder: Path, kv_gib: float | None) -> EngineConfig:
    """Our engine for a model: a whole GPU for Llama-8B, a laptop for the demo.

    Args:
        folder: where the configuration may be written.
        kv_gib: memory of the pool, KV and activations together; None is all there is.
    """
    pool = None if kv_gib is None else int(kv_gib * 1024) * MIB
    if model == "llama-8b":
        return EngineConfig(
            ModelSource(model, str(write_llama_8b(folder)), load_format="dummy"),
            MemoryConfig(pool_bytes=pool),
            SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=8192),
            device="cuda",
        )
    return EngineConfig(
        ModelSource(model, str(DEMO_MODEL), dtype="float32"),
        MemoryConfig(pool_bytes=pool or 256 * MIB),
        SchedulerConfig(max_num_seqs=16),
        max_model_len=512,
    )
