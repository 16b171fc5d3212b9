"""From an engine's configuration to a model that is ready to run on its device."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from engine.config import EngineConfig, ModelSource
from engine.errors import ConfigError
from engine.model.config import ModelConfig, SourceKind, load_model_config, source_kind
from engine.model.decoder import Decoder
from engine.model.weights import load_weights
from kernels.backend import for_device


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model on its device.

    Attributes:
        dtype: of the weights, the activations and the KV cache.
        weight_bytes: memory of the weights.
        load_s: seconds it took.
    """

    config: ModelConfig
    decoder: Decoder
    device: torch.device
    dtype: torch.dtype
    weight_bytes: int
    load_s: float


def load_model(config: EngineConfig) -> LoadedModel:
    """Load the model an engine is configured for. Sets torch's number of threads if that is configured.

    Raises:
        ModelLoadError: the model cannot be loaded from its source.
        ConfigError: there is no such device, or `max_model_len` is more than the model can do.
    """
    started = time.perf_counter()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device = _device(config)
    model = load_model_config(config.model)
    max_positions = _max_positions(config, model)
    dtype = _dtype(config.model, model, device)
    weights = load_weights(config.model, model, device, dtype)
    decoder = Decoder(model, weights, for_device(device), max_positions)
    return LoadedModel(model, decoder, device, dtype, weights.num_bytes, time.perf_counter() - started)


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
