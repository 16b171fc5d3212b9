"""Where a model comes from, and the architecture its configuration describes.

Reads configurations only (config.json through transformers, or GGUF metadata), never weights.
"""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Any, cast

import torch

from engine.config import ModelSource
from engine.errors import ModelLoadError
from engine.model.architecture import FAMILIES, ModelConfig, RopeConfig
from engine.model.gguf_config import gguf_config
from engine.model.gguf_file import GgufFile

__all__ = ["ModelConfig", "RopeConfig", "SourceKind", "load_model_config", "source_kind"]


class SourceKind(Enum):
    """What a `ModelSource.source` turned out to be."""

    DIRECTORY = "directory"
    GGUF = "gguf"
    HUB = "hub"


def source_kind(source: ModelSource) -> SourceKind:
    """Tell a directory, a `.gguf` file and a hub id apart, and check that the first two exist.

    Raises:
        ModelLoadError: nothing is there, or `load_format` asks for something else than what is there.
    """
    path = Path(source.source).expanduser()
    wants_gguf, wants_safetensors = source.load_format == "gguf", source.load_format == "safetensors"
    if source.source.endswith(".gguf"):
        if not path.is_file():
            raise ModelLoadError(f"there is no file {path}; check the path, or download the model first")
        if wants_safetensors:
            raise ModelLoadError(f"load_format is safetensors but {path} is a GGUF file; use gguf or auto")
        return SourceKind.GGUF
    if path.is_file():
        raise ModelLoadError(
            f"{path} is a file but not a .gguf file; give a directory, a GGUF file or a hub id"
        )
    if wants_gguf:
        raise ModelLoadError(f"load_format is gguf, so the source must end in .gguf, not {source.source!r}")
    if path.is_dir():
        return SourceKind.DIRECTORY
    if source.source.startswith(("/", ".", "~")) or source.source.count("/") != 1:
        raise ModelLoadError(
            f"there is no directory {path}; give a directory, a .gguf file or a hub id such as "
            "Qwen/Qwen3-0.6B"
        )
    return SourceKind.HUB


def load_model_config(source: ModelSource) -> ModelConfig:
    """Read the configuration of a model. Only a hub id may use the network.

    Raises:
        ModelLoadError: nothing readable is there, or the model is not supported.
    """
    kind = source_kind(source)
    if kind is SourceKind.GGUF:
        return gguf_config(GgufFile(Path(source.source).expanduser()))
    return _from_transformers(source.source, kind)


def _from_transformers(name: str, kind: SourceKind) -> ModelConfig:
    from transformers import AutoConfig

    is_local = kind is SourceKind.DIRECTORY
    where = str(Path(name).expanduser()) if is_local else name
    if is_local and not (Path(where) / "config.json").is_file():
        raise ModelLoadError(
            f"{where} has no config.json: it is not a model directory (a GGUF file is given by its own path)"
        )
    try:
        found = AutoConfig.from_pretrained(where, local_files_only=is_local, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = (
            "check the file" if is_local else "check the id, the network and, for a gated model, HF_TOKEN"
        )
        raise ModelLoadError(f"cannot read the configuration of {where}: {error}; {remedy}") from error
    return _facts(found, where, _generation_eos(where, is_local))


def _facts(found: Any, where: str, generation_eos: tuple[int, ...]) -> ModelConfig:
    model_type = found.model_type
    _check_supported(found, where)
    num_heads = found.num_attention_heads
    max_positions = found.max_position_embeddings
    bias = model_type == "qwen2" or bool(getattr(found, "attention_bias", False))
    return ModelConfig(
        family=FAMILIES[model_type],
        vocab_size=found.vocab_size,
        hidden_size=found.hidden_size,
        intermediate_size=found.intermediate_size,
        num_layers=found.num_hidden_layers,
        num_heads=num_heads,
        num_kv_heads=found.num_key_value_heads or num_heads,
        head_dim=getattr(found, "head_dim", None) or found.hidden_size // num_heads,
        rms_norm_eps=found.rms_norm_eps,
        max_position_embeddings=max_positions,
        rope=_rope(found.rope_parameters or {}, max_positions, where),
        attention_bias=bias,
        output_bias=bias and model_type != "qwen2",
        mlp_bias=bool(getattr(found, "mlp_bias", False)),
        qk_norm=model_type == "qwen3",
        tie_word_embeddings=bool(found.tie_word_embeddings),
        sliding_window=_sliding_window(found),
        eos_token_ids=tuple(sorted({*_ids(found.eos_token_id), *generation_eos})),
        dtype=_checkpoint_dtype(getattr(found, "dtype", None)),
    )


def _check_supported(found: Any, where: str) -> None:
    named = (found.architectures or [FAMILIES.get(found.model_type, found.model_type)])[0]
    if named not in FAMILIES.values() or found.model_type not in FAMILIES:
        raise ModelLoadError(f"{where} is a {named}; supported are {', '.join(FAMILIES.values())}")
    if getattr(found, "quantization_config", None):
        raise ModelLoadError(
            f"{where} holds quantised weights, which only GGUF files may; give the unquantised "
            "model or a GGUF file"
        )
    if found.hidden_act != "silu":
        raise ModelLoadError(f"{where} has the activation {found.hidden_act}; supported is silu")


def _rope(parameters: dict[str, Any], max_positions: int, where: str) -> RopeConfig:
    kind = parameters.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise ModelLoadError(
            f"{where} scales its rotary embedding as {kind!r}; supported are default, linear and llama3"
        )
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelLoadError(f"{where} rotates only a part of each head (partial_rotary_factor)")
    theta = float(parameters.get("rope_theta", 10000.0))
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, "linear", float(parameters["factor"]))
    return RopeConfig(
        theta,
        "llama3",
        float(parameters["factor"]),
        float(parameters["low_freq_factor"]),
        float(parameters["high_freq_factor"]),
        int(parameters.get("original_max_position_embeddings") or max_positions),
    )


def _sliding_window(found: Any) -> int | None:
    """The window, if any layer has one. Qwen lists its layers' kinds, Mistral slides in all of them."""
    layer_types = getattr(found, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    return cast("int | None", getattr(found, "sliding_window", None))


def _checkpoint_dtype(named: Any) -> torch.dtype:
    if isinstance(named, str):
        named = getattr(torch, named.removeprefix("torch."), None)
    return named if named in (torch.float16, torch.bfloat16) else torch.float32


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (int(value),)


def _generation_eos(where: str, is_local: bool) -> tuple[int, ...]:
    """Chat models often name the end of a turn only in generation_config.json, which is optional."""
    if is_local:
        path: str | None = str(Path(where) / "generation_config.json")
    else:
        from transformers.utils import cached_file

        path = cached_file(where, "generation_config.json", _raise_exceptions_for_missing_entries=False)
    if path is None or not Path(path).is_file():
        return ()
    try:
        content = json.loads(Path(path).read_text())
        return _ids(content.get("eos_token_id"))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"cannot read {path}: {error}") from error
