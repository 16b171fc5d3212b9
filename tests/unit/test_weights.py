"""Weights from safetensors, from GGUF and from a seed: right when whole, named when not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig, ModelSource
from engine.errors import ModelLoadError
from engine.model.buffers import activation_specs
from engine.model.config import load_model_config
from engine.model.linear import Linear, OneDnnLinear, make_linear
from engine.model.loader import load_model
from engine.model.shard import Shard
from engine.model.weights import Weights, load_weights
from tests.unit.model_cases import ScrambledKv, make_runner, piece, plan, save_tiny, tiny_model

CPU = torch.device("cpu")
TOKENS = list(range(5, 35))


def load(directory: Path, **options: Any) -> Weights:
    source = ModelSource("tiny", str(directory), **options)
    return load_weights(source, Shard(load_model_config(source)), CPU, torch.float32)


def logits_of(path: Path) -> torch.Tensor:
    model = load_model(EngineConfig(ModelSource("tiny", str(path))))
    kv = ScrambledKv(model.facts.config, (0,), slot_tokens=64, tokens_per_row=8)
    runner = make_runner(
        model.decoder, activation_specs(model.facts.shard, model.facts.dtype, model.facts.kernels), kv
    )
    return runner.run(plan(piece(0, TOKENS, 0, len(TOKENS))))[0].clone()


def reference_logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([TOKENS])).logits[0, -1]


def edit(directory: Path, change: Any) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_bytes_count_tied_weights_once(tmp_path: Path) -> None:
    model = save_tiny("llama-tied", tmp_path)
    weights = load(tmp_path)
    assert weights.num_bytes == 4 * sum(parameter.numel() for parameter in model.parameters())
    model = save_tiny("qwen3", tmp_path / "untied")
    weights = load(tmp_path / "untied")
    assert weights.num_bytes == 4 * sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_shards(tmp_path: Path, family: str) -> None:
    model = save_tiny(family, tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    torch.testing.assert_close(logits_of(tmp_path), reference_logits(model), atol=1e-4, rtol=1e-4)


def test_a_tied_model_may_hold_a_head(tmp_path: Path) -> None:
    model = save_tiny("qwen2", tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(199, 48)}))
    torch.testing.assert_close(logits_of(tmp_path), reference_logits(model), atol=1e-4, rtol=1e-4)


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NAME), rf"{NAME} is missing"),
        (lambda t: t.update({"model.layers.0.extra": torch.ones(1)}), r"no place for, such as .*extra"),
        (lambda t: t.update({NAME: torch.ones(80, 47)}), r"shape \(80, 47\), but .* \(80, 48\)"),
        (lambda t: t.update({NAME: torch.ones(80, 48, dtype=torch.int8)}), "int8, a quantised type"),
    ],
)
def test_wrong_tensors_are_named(tmp_path: Path, change: Any, message: str) -> None:
    save_tiny("llama", tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ModelLoadError, match=message):
        load(tmp_path)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="pickled weights"):
        load(tmp_path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: .*damaged or cut short"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../model.safetensors", "not a file beside it"),
        ("absent.safetensors", "incomplete"),
        (3, "not a file"),
    ],
)
def test_an_index_stays_in_its_directory(tmp_path: Path, file: Any, message: str) -> None:
    save_tiny("llama", tmp_path)
    index = {"weight_map": {"model.norm.weight": file}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(tmp_path: Path, content: str) -> None:
    save_tiny("llama", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelLoadError, match="not a safetensors index"):
        load(tmp_path)


@pytest.mark.parametrize("rows", [1, 2, 16, 255, 256, 257, 600])
@pytest.mark.parametrize("has_bias", [False, True])
def test_both_forms_of_a_linear_layer_agree(rows: int, has_bias: bool) -> None:
    torch.manual_seed(rows)
    weight, x = torch.randn(72, 40), torch.randn(rows, 40)
    bias = torch.randn(72) if has_bias else None
    wanted = torch.nn.functional.linear(x.double(), weight.double(), bias.double() if has_bias else None)
    layers = [Linear(weight, bias), make_linear(weight, bias), make_linear(weight, bias, is_embedding=True)]
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        assert isinstance(layers[1], OneDnnLinear)
    for layer in layers:
        out = torch.full((rows, 72), float("nan"))
        assert layer(x, out) is out
        torch.testing.assert_close(out.double(), wanted, atol=1e-4, rtol=1e-4)


def write_gguf(path: Path, model: Any, arch: str, quantization: GGMLQuantizationType) -> None:
    """A model as llama.cpp stores it: heads of llama interleaved, matrices quantised."""
    config = model.config
    writer = GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(getattr(config, "head_dim", None) or 8)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
            values = interleave(values, heads)
        if values.ndim == 1:
            writer.add_tensor(gguf_name(name), values)
        else:
            stored = quants.quantize(values, quantization)
            writer.add_tensor(gguf_name(name), stored, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """Row i of a head's first half to 2i, row i of its second half to 2i + 1."""
    size = values.shape[0] // heads
    out = np.empty_like(values)
    for head in range(heads):
        for row in range(size // 2):
            out[head * size + 2 * row] = values[head * size + row]
            out[head * size + 2 * row + 1] = values[head * size + size // 2 + row]
    return out


def gguf_name(name: str) -> str:
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    part = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    stem, kind = name.rsplit(".", 1)
    if stem in whole:
        return f"{whole[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{part[rest]}.{kind}"


@pytest.mark.parametrize(
    ("family", "arch"),
    [("llama-biases", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")],
)
@pytest.mark.parametrize("quantization", [GGMLQuantizationType.F32, GGMLQuantizationType.F16])
def test_gguf_of_each_family(
    tmp_path: Path, family: str, arch: str, quantization: GGMLQuantizationType
) -> None:
    model = tiny_model(family)
    write_gguf(tmp_path / "m.gguf", model, arch, quantization)
    if quantization == GGMLQuantizationType.F16:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(parameter.half())
    found = logits_of(tmp_path / "m.gguf")
    torch.testing.assert_close(found, reference_logits(model), atol=1e-4, rtol=1e-4)


def test_a_gguf_tensor_too_many_is_named(tmp_path: Path) -> None:
    model = tiny_model("llama-biases")
    model.config.num_hidden_layers = 2
    write_gguf(tmp_path / "m.gguf", model, "llama", GGMLQuantizationType.F32)
    with pytest.raises(ModelLoadError, match=r"no place for, such as blk\.2"):
        load(tmp_path / "m.gguf")


def test_a_gguf_tensor_missing_is_named(tmp_path: Path) -> None:
    model = tiny_model("llama-biases")
    model.config.num_hidden_layers = 4
    write_gguf(tmp_path / "m.gguf", model, "llama", GGMLQuantizationType.F32)
    with pytest.raises(ModelLoadError, match=r"blk\.3\.attn_norm\.weight .* is missing"):
        load(tmp_path / "m.gguf")
