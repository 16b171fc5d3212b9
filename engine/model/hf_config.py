"""The architecture that a `config.json` of the Hugging Face form describes.

Owns what its fields mean: the old and the new spelling, and what a field that is left out stands for. It
gives what transformers' configuration classes give (tests/unit/test_hf_config.py) without importing them:
that import took 11 s of an engine's start on a GPU host. It opens no file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from engine.errors import ModelLoadError
from engine.model.architecture import FAMILIES, ModelConfig, RopeConfig

# Fields that a config.json may leave out, as transformers 5.23 fills them in: the class attributes of
# LlamaConfig, MistralConfig, Qwen2Config and Qwen3Config. Whatever is in neither table counts as null.
_ALL_FAMILIES: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
_QWEN: dict[str, Any] = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_LEFT_OUT: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "eos_token_id": 2,
    },
    "mistral": {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "eos_token_id": 2,
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
}


def hf_config(content: dict[str, Any], where: str, generation: dict[str, Any]) -> ModelConfig:
    """The facts of a model from its configuration files.

    Args:
        content: of config.json.
        where: the model's directory or hub id, for messages.
        generation: of generation_config.json, which chat models name the end of a turn in; may be empty.

    Raises:
        ModelLoadError: the model is not supported, or a field has no value that it can have.
    """
    model_type = _supported_model_type(content, where)
    fields = _Fields({**_ALL_FAMILIES, **_LEFT_OUT[model_type], **content}, where)
    _check_supported(fields)
    bias = model_type == "qwen2" or fields.flag("attention_bias")
    num_heads = fields.whole("num_attention_heads")
    eos_token_ids = {*fields.token_ids("eos_token_id")}
    eos_token_ids.update(_Fields(generation, where, "generation_config.json").token_ids("eos_token_id"))
    return ModelConfig(
        family=FAMILIES[model_type],
        vocab_size=fields.whole("vocab_size"),
        hidden_size=fields.whole("hidden_size"),
        intermediate_size=fields.whole("intermediate_size"),
        num_layers=fields.whole("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=fields.whole_or_none("num_key_value_heads") or num_heads,
        head_dim=fields.whole_or_none("head_dim") or _derived_head_dim(fields),
        rms_norm_eps=fields.number("rms_norm_eps"),
        max_position_embeddings=fields.whole("max_position_embeddings"),
        rope=_rope(fields),
        attention_bias=bias,
        output_bias=bias and model_type != "qwen2",
        mlp_bias=fields.flag("mlp_bias"),
        qk_norm=model_type == "qwen3",
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        sliding_window=_sliding_window(fields, model_type),
        eos_token_ids=tuple(sorted(eos_token_ids)),
        dtype=_checkpoint_dtype(fields),
    )


@dataclass(frozen=True, slots=True)
class _Fields:
    """Typed reads of a JSON object. A field that is absent reads as null."""

    content: dict[str, Any]
    where: str
    section: str = "config.json"

    def get(self, name: str) -> Any:
        return self.content.get(name)

    def whole(self, name: str, at_least: int = 1) -> int:
        value = self.get(name)
        if not _is_int(value) or value < at_least:
            raise self.wrong(name, f"a whole number of at least {at_least}")
        return int(value)

    def whole_or_none(self, name: str) -> int | None:
        return None if self.get(name) is None else self.whole(name)

    def number(self, name: str) -> float:
        value = self.get(name)
        if not (_is_int(value) or isinstance(value, float)) or not 0 < value < math.inf:
            raise self.wrong(name, "a number above 0")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return bool(value)

    def token_ids(self, name: str) -> list[int]:
        value = self.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(_is_int(token) for token in ids):
            raise self.wrong(name, "a token id, a list of them or null")
        return ids

    def texts_or_none(self, name: str) -> list[str] | None:
        value = self.get(name)
        if value is not None and not (
            isinstance(value, list) and all(isinstance(text, str) for text in value)
        ):
            raise self.wrong(name, "a list of names or null")
        return value

    def wrong(self, name: str, expected: str) -> ModelLoadError:
        found = repr(self.get(name)) if name in self.content else "absent"
        return ModelLoadError(
            f"{name} in the {self.section} of {self.where} must be {expected}, but is {found}; check the file"
        )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _supported_model_type(content: dict[str, Any], where: str) -> str:
    model_type = content.get("model_type")
    if not isinstance(model_type, str):
        raise ModelLoadError(
            f"cannot read the configuration of {where}: config.json has no model_type; check the file"
        )
    architectures = _Fields(content, where).texts_or_none("architectures")
    named = (architectures or [FAMILIES.get(model_type, model_type)])[0]
    if model_type == "mistral" and "layer_types" in content:
        named = "MinistralForCausalLM"  # transformers takes it for one too
    if named not in FAMILIES.values():
        raise ModelLoadError(f"{where} is a {named}; supported are {', '.join(FAMILIES.values())}")
    if model_type not in FAMILIES:
        raise ModelLoadError(
            f"cannot read the configuration of {where}: the model_type {model_type!r} is not known; "
            f"supported are {', '.join(FAMILIES)}"
        )
    return model_type


def _check_supported(fields: _Fields) -> None:
    where = fields.where
    if fields.get("quantization_config"):
        raise ModelLoadError(
            f"{where} holds quantised weights, which only GGUF files may; give the unquantised "
            "model or a GGUF file"
        )
    if fields.get("hidden_act") != "silu":
        raise ModelLoadError(f"{where} has the activation {fields.get('hidden_act')}; supported is silu")
    if fields.get("per_layer_config"):
        raise ModelLoadError(f"{where} has layers of different shapes (per_layer_config)")


def _derived_head_dim(fields: _Fields) -> int:
    hidden_size, num_heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    if hidden_size % num_heads:
        raise ModelLoadError(
            f"{fields.where} names no head_dim, and its {num_heads} heads do not divide its hidden_size "
            f"{hidden_size}"
        )
    return hidden_size // num_heads


def _rope(fields: _Fields) -> RopeConfig:
    parameters = _rope_fields(fields)
    kind = parameters.get("rope_type")
    if kind not in ("default", "linear", "llama3"):
        raise ModelLoadError(
            f"{fields.where} scales its rotary embedding as {kind!r}; supported are default, linear and "
            "llama3"
        )
    if parameters.get("partial_rotary_factor") not in (None, 1.0):
        raise ModelLoadError(f"{fields.where} rotates only a part of each head (partial_rotary_factor)")
    theta = parameters.number("rope_theta")
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, "linear", parameters.number("factor"))
    return RopeConfig(
        theta,
        "llama3",
        parameters.number("factor"),
        parameters.number("low_freq_factor"),
        parameters.number("high_freq_factor"),
        parameters.whole_or_none("original_max_position_embeddings")
        or fields.whole("max_position_embeddings"),
    )


def _rope_fields(fields: _Fields) -> _Fields:
    """Both spellings as one: `rope_scaling` beside `rope_theta`, and transformers 5's `rope_parameters`."""
    section = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    scaling = fields.get(section) or {}
    if not isinstance(scaling, dict):
        raise fields.wrong(section, "an object or null")
    if any(isinstance(value, dict) for value in scaling.values()):
        raise ModelLoadError(f"{fields.where} rotates each kind of layer in another way ({section})")
    outside = {
        "rope_type": scaling.get("type", "default"),
        "rope_theta": fields.get("rope_theta"),
        "partial_rotary_factor": fields.get("partial_rotary_factor"),
    }
    return _Fields({**outside, **scaling}, fields.where, f"{section} of the config.json")


def _sliding_window(fields: _Fields, model_type: str) -> int | None:
    """The window, if any layer has one. Qwen lists its layers' kinds, Mistral slides in all of them."""
    num_layers = fields.whole("num_hidden_layers")
    layer_types = fields.texts_or_none("layer_types")
    if layer_types is not None:
        if len(layer_types) != num_layers:
            raise fields.wrong("layer_types", f"a list of {num_layers} names, one a layer")
        unknown = set(layer_types) - {"full_attention", "sliding_attention"}
        if unknown:
            raise ModelLoadError(
                f"{fields.where} has layers of the kind {min(unknown)!r}; supported are full_attention and "
                "sliding_attention"
            )
        if "sliding_attention" not in layer_types:
            return None
    if model_type in ("qwen2", "qwen3"):
        if not fields.flag("use_sliding_window"):
            return None
        if layer_types is None and fields.whole("max_window_layers", at_least=0) >= num_layers:
            return None
    return fields.whole_or_none("sliding_window")


def _checkpoint_dtype(fields: _Fields) -> torch.dtype:
    name = "torch_dtype" if fields.get("dtype") is None else "dtype"
    named = fields.get(name)
    if named is None:
        return torch.float32
    dtype = getattr(torch, named.removeprefix("torch."), None) if isinstance(named, str) else None
    if not isinstance(dtype, torch.dtype):
        raise fields.wrong(name, "the name of a type of torch, such as bfloat16")
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32
