"""Sizes that are decided once, at an engine's start: how KV fills chunks, and the longest sequence."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from engine.config import MIB, EngineConfig, MemoryConfig
from engine.errors import ConfigError
from engine.memory.arena import SMALLEST_PIECE, BufferSpec, activation_bytes
from engine.memory.kv_geometry import KvGeometry
from engine.model.loader import ModelFacts

logger = logging.getLogger(__name__)

_CPU_CHUNK_BYTES = MIB // 2
_GPU_CHUNK_BYTES = 2 * MIB


def kv_geometry(facts: ModelFacts, memory: MemoryConfig) -> KvGeometry:
    """How a rank's share of KV fills chunks; the same on every rank."""
    share = facts.shard.local
    on_gpu = facts.device.type == "cuda"
    return KvGeometry.choose(
        share.num_layers,
        share.num_kv_heads,
        share.head_dim,
        facts.dtype.itemsize,
        memory.chunk_bytes or (_GPU_CHUNK_BYTES if on_gpu else _CPU_CHUNK_BYTES),
        memory.layers_per_group,
        min_tokens=128 if on_gpu else 64,  # no tiles on a CPU; smaller chunks waste less
    )


def fit_model_len(
    config: EngineConfig, model_limit: int, geometry: KvGeometry, specs: Sequence[BufferSpec], total: int
) -> int:
    """The longest sequence: what was asked for if it fits, else as long as model and pool allow.

    Raises:
        ConfigError: the pool cannot hold it, or the model was made for less.
    """
    limits = config.scheduler
    step = (limits.largest_step, limits.max_num_seqs)
    if config.memory.mode == "elastic":
        step = (SMALLEST_PIECE, 1)
    activations = max(1, -(-activation_bytes(specs, *step) // geometry.chunk_bytes))
    left = total - 1 - activations  # one is the guard
    fits = max(0, left) // geometry.num_groups * geometry.tokens_per_chunk
    asked = config.max_model_len
    if asked is not None and asked > model_limit:
        raise ConfigError(f"max_model_len is {asked}, and the model was made for {model_limit}: lower it")
    if fits < min(asked or SMALLEST_PIECE, model_limit):
        least = geometry.chunks_for(asked or SMALLEST_PIECE) + 1 + activations
        raise ConfigError(
            f"a pool of {total} chunks of {geometry.chunk_bytes >> 10} KiB holds a sequence of {fits} tokens "
            f"beside the activations, and {asked or SMALLEST_PIECE} are needed: set memory.pool_bytes to at "
            f"least {least * geometry.chunk_bytes} or lower max_model_len"
        )
    if asked is None and fits < model_limit:
        logger.warning("max_model_len is %d: the model allows %d, the pool no more", fits, model_limit)
    return asked or min(model_limit, fits)
