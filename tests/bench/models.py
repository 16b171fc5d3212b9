"""The models that benchmarks run: Llama-3.1-8B's shape with random weights, and the CPU demo model.

`llama-8b-256k` is the same shape and says that it takes 262,144 tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.config import MIB, EngineConfig, MemoryConfig, ModelSource, SchedulerConfig
from tests.bench.engine_options import EngineOptions

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
LLAMAS = {"llama-8b": LLAMA_8B, "llama-8b-256k": LLAMA_8B | {"max_position_embeddings": 262144}}
MODELS = (*LLAMAS, "demo")


def write_llama(model: str, folder: Path) -> Path:
    """A directory that has a shape and no weights: what `load_format="dummy"` needs."""
    (folder / "config.json").write_text(json.dumps(LLAMAS[model]))
    return folder


def write_llama_8b(folder: Path) -> Path:
    """The same for Llama-3.1-8B as it is."""
    return write_llama("llama-8b", folder)


def engine_config(model: str, folder: Path, options: EngineOptions | None = None) -> EngineConfig:
    """Our engine for a model: a whole GPU for Llama-8B, a laptop for the demo.

    Args:
        folder: where the configuration may be written.
        options: what differs from that.

    Raises:
        ConfigError: options that cannot be.
    """
    if model in LLAMAS:
        config = EngineConfig(
            ModelSource(model, str(write_llama(model, folder)), load_format="dummy"),
            MemoryConfig(),
            SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=8192),
            device="cuda",
        )
    else:
        config = EngineConfig(
            ModelSource(model, str(DEMO_MODEL), dtype="float32"),
            MemoryConfig(pool_bytes=256 * MIB),
            SchedulerConfig(max_num_seqs=16),
            max_model_len=512,
        )
    return (options or EngineOptions()).applied_to(config)
