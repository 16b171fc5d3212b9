"""config.json, read here and by transformers: the same model. And what is refused, with its field named."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from engine.config import ModelSource
from engine.errors import ModelLoadError
from engine.model.architecture import FAMILIES
from engine.model.config import ModelConfig, RopeConfig, load_model_config
from engine.model.hf_config import hf_config
from tests.unit.hf_configs import PUBLIC

LLAMA_3, MISTRAL, QWEN_2, QWEN_3 = (
    PUBLIC[name] for name in ("Llama-3.1-8B", "Mistral-7B-v0.1", "Qwen2.5-0.5B", "Qwen3-8B")
)
LLAMA3_ROPE: dict[str, Any] = LLAMA_3["rope_scaling"]


def oracle(directory: Path) -> ModelConfig:
    """The same facts, taken from transformers' configuration object."""
    found: Any = AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    bias = found.model_type == "qwen2" or bool(getattr(found, "attention_bias", False))
    eos = found.eos_token_id
    return ModelConfig(
        family=FAMILIES[found.model_type],
        vocab_size=found.vocab_size,
        hidden_size=found.hidden_size,
        intermediate_size=found.intermediate_size,
        num_layers=found.num_hidden_layers,
        num_heads=found.num_attention_heads,
        num_kv_heads=found.num_key_value_heads or found.num_attention_heads,
        head_dim=getattr(found, "head_dim", None) or found.hidden_size // found.num_attention_heads,
        rms_norm_eps=found.rms_norm_eps,
        max_position_embeddings=found.max_position_embeddings,
        rope=_oracle_rope(found.rope_parameters, found.max_position_embeddings),
        attention_bias=bias,
        output_bias=bias and found.model_type != "qwen2",
        mlp_bias=bool(getattr(found, "mlp_bias", False)),
        qk_norm=found.model_type == "qwen3",
        tie_word_embeddings=bool(found.tie_word_embeddings),
        sliding_window=_oracle_window(found),
        eos_token_ids=tuple(sorted(set(eos) if isinstance(eos, list) else {eos} - {None})),
        dtype=found.dtype if found.dtype in (torch.float16, torch.bfloat16) else torch.float32,
    )


def _oracle_rope(parameters: dict[str, Any], max_positions: int) -> RopeConfig:
    theta = float(parameters["rope_theta"])
    if parameters["rope_type"] == "default":
        return RopeConfig(theta)
    if parameters["rope_type"] == "linear":
        return RopeConfig(theta, "linear", float(parameters["factor"]))
    return RopeConfig(
        theta,
        "llama3",
        float(parameters["factor"]),
        float(parameters["low_freq_factor"]),
        float(parameters["high_freq_factor"]),
        int(parameters.get("original_max_position_embeddings") or max_positions),
    )


def _oracle_window(found: Any) -> int | None:
    layer_types = getattr(found, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    return cast("int | None", getattr(found, "sliding_window", None))


def read(directory: Path, content: dict[str, Any]) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(content))
    return load_model_config(ModelSource("m", str(directory)))


def assert_agrees(directory: Path, content: dict[str, Any]) -> None:
    (directory / "config.json").write_text(json.dumps(content))
    try:
        expected = oracle(directory)
    except ModelLoadError as error:  # what ModelConfig itself refuses
        with pytest.raises(ModelLoadError, match=str(error)):
            read(directory, content)
    else:
        assert read(directory, content) == expected


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_model(tmp_path: Path, name: str) -> None:
    assert_agrees(tmp_path, PUBLIC[name])


# 4096, what hidden_size stands for when left out, is no multiple of their 14 and 28 heads.
_NO_HEAD_DIM = {("Qwen2.5-0.5B", "hidden_size"), ("Qwen2.5-7B", "hidden_size")}


@pytest.mark.parametrize(
    ("name", "field"),
    [
        (name, field)
        for name, content in PUBLIC.items()
        for field in content
        if field != "model_type" and (name, field) not in _NO_HEAD_DIM
    ],
)
def test_a_field_left_out(tmp_path: Path, name: str, field: str) -> None:
    assert_agrees(tmp_path, {key: value for key, value in PUBLIC[name].items() if key != field})


@pytest.mark.parametrize("model_type", FAMILIES)
def test_nothing_but_the_family(tmp_path: Path, model_type: str) -> None:
    assert_agrees(tmp_path, {"model_type": model_type, "architectures": [FAMILIES[model_type]]})
    assert_agrees(tmp_path, {"model_type": model_type})


VARIANTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (LLAMA_3, {"rope_scaling": {"type": "linear", "factor": 4}}),
    (LLAMA_3, {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 4.0}}),
    (LLAMA_3, {"rope_scaling": {"rope_type": "default"}}),
    (LLAMA_3, {"rope_scaling": {}, "rope_theta": 7}),
    (
        LLAMA_3,
        {"rope_scaling": {key: LLAMA3_ROPE[key] for key in LLAMA3_ROPE if not key.startswith("original")}},
    ),
    (LLAMA_3, {"rope_scaling": {**LLAMA3_ROPE, "rope_theta": 3.5}}),
    (LLAMA_3, {"rope_scaling": None, "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 3.5}}),
    (LLAMA_3, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 3.5}}),
    (LLAMA_3, {"rope_scaling": None, "rope_parameters": None}),
    (LLAMA_3, {"rope_scaling": None, "rope_parameters": {}}),
    (LLAMA_3, {"partial_rotary_factor": 1.0}),
    (LLAMA_3, {"architectures": None}),
    (LLAMA_3, {"architectures": []}),
    (LLAMA_3, {"num_key_value_heads": None, "head_dim": None}),
    (LLAMA_3, {"head_dim": 64}),
    (LLAMA_3, {"attention_bias": True}),
    (LLAMA_3, {"mlp_bias": True}),
    (LLAMA_3, {"eos_token_id": [128009, 128001, 128009]}),
    (LLAMA_3, {"eos_token_id": []}),
    (LLAMA_3, {"eos_token_id": None}),
    (LLAMA_3, {"torch_dtype": "float32"}),
    (LLAMA_3, {"torch_dtype": "half"}),
    (LLAMA_3, {"dtype": "float16"}),
    (LLAMA_3, {"dtype": None}),
    (LLAMA_3, {"torch_dtype": None}),
    (LLAMA_3, {"quantization_config": None}),
    (LLAMA_3, {"quantization_config": {}}),
    (LLAMA_3, {"sliding_window": 4096}),
    (LLAMA_3, {"sliding_window": 4096, "layer_types": ["full_attention"] * 32}),
    (LLAMA_3, {"sliding_window": 4096, "layer_types": ["sliding_attention"] * 32}),
    (MISTRAL, {"attention_bias": True}),
    (MISTRAL, {"head_dim": 160}),
    (MISTRAL, {"mlp_bias": None}),
    (QWEN_2, {"head_dim": 64}),
    (QWEN_2, {"attention_bias": True}),
    (QWEN_2, {"attention_bias": False}),
    (QWEN_2, {"num_key_value_heads": None}),
    (QWEN_2, {"use_sliding_window": True}),
    (QWEN_2, {"use_sliding_window": True, "max_window_layers": 0}),
    (QWEN_2, {"use_sliding_window": True, "max_window_layers": 23}),
    (QWEN_2, {"use_sliding_window": True, "max_window_layers": 23, "sliding_window": None}),
    (QWEN_2, {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 24}),
    (QWEN_2, {"use_sliding_window": True, "layer_types": ["full_attention"] * 24}),
    (QWEN_2, {"use_sliding_window": True, "max_window_layers": 0, "layer_types": None}),
    (QWEN_2, {"layer_types": ["sliding_attention"] * 24}),
    (QWEN_3, {"attention_bias": True}),
    (QWEN_3, {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 3}),
    (QWEN_3, {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
]


@pytest.mark.parametrize(("content", "changes"), VARIANTS)
def test_a_variant(tmp_path: Path, content: dict[str, Any], changes: dict[str, Any]) -> None:
    assert_agrees(tmp_path, {**content, **changes})


@pytest.mark.parametrize("use_diff", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(),
        LlamaConfig(rope_parameters={**LLAMA3_ROPE, "rope_theta": 5e5}, dtype=torch.bfloat16),
        LlamaConfig(head_dim=96, eos_token_id=[7, 9], tie_word_embeddings=True),
        MistralConfig(),
        MistralConfig(sliding_window=None, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        Qwen2Config(use_sliding_window=True),
        Qwen2Config(num_hidden_layers=40, use_sliding_window=True, sliding_window=512),
        Qwen3Config(dtype="float16"),
        Qwen3Config(attention_bias=True, eos_token_id=5),
    ],
    ids=lambda config: config.model_type,
)
def test_what_transformers_saves(tmp_path: Path, config: Any, use_diff: bool) -> None:
    config.architectures = [FAMILIES[config.model_type]]
    config.to_json_file(tmp_path / "config.json", use_diff=use_diff)
    assert_agrees(tmp_path, json.loads((tmp_path / "config.json").read_text()))


_HEADS = st.sampled_from([8, 16, 32])
_FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "vocab_size": st.integers(1, 200_000),
    "hidden_size": st.sampled_from([512, 1024, 4096]),
    "intermediate_size": st.integers(1, 20_000),
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _HEADS,
    "num_hidden_layers": st.integers(1, 40),
    "head_dim": st.sampled_from([64, 96, 128]),
    "rms_norm_eps": st.sampled_from([1e-5, 1e-6]),
    "max_position_embeddings": st.integers(1, 200_000),
    "rope_theta": st.sampled_from([10000, 5e5]),
    "rope_scaling": st.sampled_from([None, {"type": "linear", "factor": 2}, LLAMA3_ROPE]),
    "rope_parameters": st.sampled_from([{"rope_type": "default", "rope_theta": 9.0}, LLAMA3_ROPE]),
    "attention_bias": st.booleans(),
    "mlp_bias": st.booleans(),
    "tie_word_embeddings": st.booleans(),
    "use_sliding_window": st.booleans(),
    "sliding_window": st.sampled_from([None, 512, 4096]),
    "max_window_layers": st.integers(0, 40),
    "eos_token_id": st.sampled_from([None, 0, 2, [2], [5, 3]]),
    "torch_dtype": st.sampled_from(["float16", "bfloat16", "float32"]),
    "dtype": st.sampled_from([None, "float16", "bfloat16"]),
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(model_type=st.sampled_from(list(FAMILIES)), content=st.fixed_dictionaries({}, optional=_FIELDS))
def test_any_choice_of_fields(tmp_path: Path, model_type: str, content: dict[str, Any]) -> None:
    assert_agrees(tmp_path, {"model_type": model_type, **content})


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (LLAMA_3, {"hidden_size": "4096"}, "^hidden_size in the config.json of .* but is '4096'; check"),
        (LLAMA_3, {"hidden_size": None}, "hidden_size .* a whole number of at least 1, but is None"),
        (LLAMA_3, {"hidden_size": 4096.0}, "hidden_size .* 4096.0"),
        (LLAMA_3, {"hidden_size": 100, "num_attention_heads": 3}, "no head_dim, and its 3 heads"),
        (LLAMA_3, {"vocab_size": True}, "vocab_size .* True"),
        (LLAMA_3, {"num_hidden_layers": 0}, "num_hidden_layers .* is 0"),
        (LLAMA_3, {"num_attention_heads": -1}, "num_attention_heads"),
        (LLAMA_3, {"num_key_value_heads": [8]}, "num_key_value_heads"),
        (LLAMA_3, {"intermediate_size": {}}, "intermediate_size"),
        (LLAMA_3, {"max_position_embeddings": 1e5}, "max_position_embeddings"),
        (LLAMA_3, {"head_dim": "64"}, "head_dim"),
        (LLAMA_3, {"head_dim": 63}, "head_dim must be even"),
        (LLAMA_3, {"rms_norm_eps": "1e-5"}, "rms_norm_eps .* a number above 0"),
        (LLAMA_3, {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        (LLAMA_3, {"rope_theta": "1e6"}, "rope_theta"),
        (LLAMA_3, {"rope_theta": None}, "rope_theta"),
        (LLAMA_3, {"rope_scaling": "linear"}, "rope_scaling .* an object"),
        (LLAMA_3, {"rope_scaling": {"type": "linear"}}, "factor in the rope_scaling .* is absent"),
        (LLAMA_3, {"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": None}}, "low_freq_factor"),
        (LLAMA_3, {"rope_scaling": {"full_attention": LLAMA3_ROPE}}, "each kind of layer"),
        (LLAMA_3, {"partial_rotary_factor": 0.5}, "part of each head"),
        (LLAMA_3, {"tie_word_embeddings": "yes"}, "tie_word_embeddings .* true or false"),
        (LLAMA_3, {"attention_bias": 1}, "attention_bias"),
        (LLAMA_3, {"eos_token_id": "2"}, "eos_token_id"),
        (LLAMA_3, {"eos_token_id": [2, None]}, "eos_token_id"),
        (LLAMA_3, {"torch_dtype": "bf16"}, "torch_dtype .* such as bfloat16"),
        (LLAMA_3, {"dtype": 16}, "^dtype"),
        (LLAMA_3, {"architectures": "LlamaForCausalLM"}, "architectures .* a list of names"),
        (LLAMA_3, {"model_type": None}, "no model_type"),
        (LLAMA_3, {"per_layer_config": {"1": {"intermediate_size": 64}}}, "per_layer_config"),
        (MISTRAL, {"layer_types": ["full_attention"] * 32}, "is a MinistralForCausalLM; supported"),
        (MISTRAL, {"sliding_window": 0}, "sliding_window"),
        (QWEN_2, {"layer_types": ["full_attention"]}, "layer_types .* a list of 24 names"),
        (QWEN_2, {"layer_types": ["linear_attention"] * 24}, "kind 'linear_attention'; supported"),
        (QWEN_2, {"use_sliding_window": True, "max_window_layers": None}, "max_window_layers"),
    ],
)
def test_a_wrong_field_is_named(
    tmp_path: Path, content: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelLoadError, match=message):
        read(tmp_path, {**content, **changes})


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(
    content=st.sampled_from([LLAMA_3, MISTRAL, QWEN_2, QWEN_3]),
    field=st.sampled_from(sorted({*LLAMA_3, *QWEN_3, "rope_parameters", "layer_types", "dtype"})),
    value=_JSON,
)
def test_any_value_is_read_or_refused(content: dict[str, Any], field: str, value: Any) -> None:
    changed: dict[str, Any] = {**content, "use_sliding_window": True, field: value}
    with contextlib.suppress(ModelLoadError):  # and no other error
        assert isinstance(hf_config(changed, "m", {}), ModelConfig)


@pytest.mark.parametrize("text", ["", "[1]", '"x"', "{", '{"model_type": "llama"', "\xff", "[" * 100_000])
def test_a_damaged_config_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelLoadError, match=r"cannot read the configuration of .*config\.json.*check the"):
        load_model_config(ModelSource("m", str(tmp_path)))


def test_a_wrong_id_in_the_generation_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["a"]}')
    with pytest.raises(ModelLoadError, match=r"eos_token_id in the generation_config\.json"):
        read(tmp_path, LLAMA_3)
