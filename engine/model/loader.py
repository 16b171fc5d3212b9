"""From an engine's configuration to a model that is ready to run on its device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engine.config import EngineConfig, ModelSource
from engine.errors import ConfigError
from engine.model.config import ModelConfig, SourceKind, load_model_config, source_kind
from engine.model.decoder import Decoder
from engine.model.rank_group import RankGroup
from engine.model.shard import Shard
from engine.model.weights import load_weights
from kernels.backend import Kernels, for_device

if TYPE_CHECKING:
    from engine.model.peers import Peers


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model before its weights are there.

    Attributes:
        shard: what this rank has of the model.
        kernels: the implementation for the device.
        dtype: of the weights, the activations and the KV cache.
        max_positions: positions to prepare for.
    """

    shard: Shard
    kernels: Kernels
    device: torch.device
    dtype: torch.dtype
    max_positions: int

    @property
    def config(self) -> ModelConfig:
        """The architecture of the whole model."""
        return self.shard.config


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model on its device.

    Attributes:
        weight_bytes: memory of the weights.
    """

    facts: ModelFacts
    decoder: Decoder
    weight_bytes: int


def read_model(config: EngineConfig, rank: int = 0) -> ModelFacts:
    """The facts of the model an engine is configured for. Sets torch's number of threads if configured.

    Args:
        rank: of the engine in its TP group.

    Raises:
        ModelLoadError: nothing readable is there, or the model is not supported.
        ConfigError: there is no such device, `max_model_len` is more than the model can do, or it has fewer
            attention heads than the group has ranks.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    return facts_on(_device(config), config, rank)


def facts_on(device: torch.device, config: EngineConfig, rank: int = 0) -> ModelFacts:
    """The same on a device that need not be there. Raises as `read_model`, but for the device."""
    model = load_model_config(config.model)
    dtype = _dtype(config.model, model, device)
    shard = Shard(model, rank, config.tensor_parallel_size)
    return ModelFacts(shard, for_device(device), device, dtype, _max_positions(config, model))


def load_model(
    config: EngineConfig,
    facts: ModelFacts | None = None,
    ranks: RankGroup | None = None,
    peers: Peers | None = None,
) -> LoadedModel:
    """Load the model an engine is configured for.

    Args:
        facts: what `read_model` found; None reads them here.
        ranks: the other ranks of the TP group, if there are any.
        peers: their memory, where the GPUs reach one another.

    Raises:
        ModelLoadError: the model cannot be loaded from its source.
        ConfigError: as `read_model`.
    """
    facts = facts or read_model(config)
    weights = load_weights(config.model, facts.shard, facts.device, facts.dtype)
    decoder = Decoder(facts.shard, weights, facts.kernels, facts.max_positions, ranks, peers)
    return LoadedModel(facts, decoder, weights.num_bytes)


def _device(config: EngineConfig) -> torch.device:
    if config.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch finds no GPU; set device: cpu, or install a CUDA build")
    return torch.device("cuda", torch.cuda.current_device())


def _max_positions(config: EngineConfig, model: ModelConfig) -> int:
    wanted = config.max_model_len
    if wanted is None:
        return model.max_context
    if not 1 <= wanted <= model.max_context:
        window = ", its sliding window" if model.max_context == model.sliding_window else ""
        raise ConfigError(
            f"max_model_len is {wanted}, but the model handles 1 to {model.max_context} tokens{window}"
        )
    return wanted


def _dtype(source: ModelSource, model: ModelConfig, device: torch.device) -> torch.dtype:
    if source.dtype != "auto":
        named: torch.dtype = getattr(torch, source.dtype)
        return named
    if device.type == "cpu":
        return torch.float32
    if source.load_format == "dummy" or source_kind(source) is SourceKind.GGUF:
        return torch.bfloat16
    return torch.bfloat16 if model.dtype == torch.float32 else model.dtype
