"""The demo model (SmolLM2 135M, GGUF) against transformers' own reading of the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig, ModelSource
from engine.model.buffers import activation_specs
from engine.model.loader import LoadedModel, load_model
from engine.model.runner import ModelRunner
from tests.unit.model_cases import ScrambledKv, make_runner, piece, plan

pytestmark = pytest.mark.model

# "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n"
PROMPT = [1, 4093, 198, 1780, 314, 14249, 47, 2, 198, 1, 520, 9531, 198]
NUM_NEW = 16


@pytest.fixture(scope="module")
def model(demo_model_path: Path) -> LoadedModel:
    return load_model(EngineConfig(ModelSource("demo", str(demo_model_path)), max_model_len=256))


@pytest.fixture(scope="module")
def reference(demo_model_path: Path, model: LoadedModel) -> Any:
    """transformers' model with the tensors that transformers dequantised.

    Not `from_pretrained(gguf_file=...)`, which asks for accelerate.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with torch.device("meta"):
        shell = LlamaForCausalLM(LlamaConfig(num_hidden_layers=model.facts.config.num_layers))
    parsed = load_gguf_checkpoint(str(demo_model_path), return_tensors=True, model_to_load=shell)
    found = parsed["config"]
    config = LlamaConfig(**{key: value for key, value in found.items() if not key.startswith("_")})
    with torch.device("meta"):
        whole = LlamaForCausalLM(config)
    whole.load_state_dict(parsed["tensors"], strict=False, assign=True)
    whole.tie_weights()
    whole.model.rotary_emb = type(whole.model.rotary_emb)(config)
    assert not any(parameter.is_meta for parameter in whole.parameters())
    return whole.float().eval()


def runner_of(model: LoadedModel) -> ModelRunner:
    kv = ScrambledKv(model.facts.config, (1, 0), slot_tokens=64, tokens_per_row=16)
    return make_runner(
        model.decoder, activation_specs(model.facts.shard, model.facts.dtype, model.facts.kernels), kv
    )


def test_configuration_is_what_transformers_reads(model: LoadedModel, reference: Any) -> None:
    ours, theirs = model.facts.config, reference.config
    assert (ours.vocab_size, ours.hidden_size, ours.intermediate_size) == (49152, 576, 1536)
    assert ours.vocab_size == theirs.vocab_size
    assert ours.num_layers == theirs.num_hidden_layers
    assert (ours.num_heads, ours.num_kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    assert ours.head_dim == theirs.head_dim
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.eos_token_ids == (2,)  # <|im_end|>
    assert model.facts.dtype == torch.float32


def test_logits_and_greedy_tokens(model: LoadedModel, reference: Any) -> None:
    tokens, rows, runner = list(PROMPT), [], runner_of(model)
    for _ in range(NUM_NEW):
        start = 0 if not rows else len(tokens) - 1
        rows.append(runner.run(plan(piece(0, tokens, start, len(tokens))))[0].clone())
        tokens.append(int(rows[-1].argmax()))
    with torch.inference_mode():
        expected = reference(torch.tensor([tokens])).logits[0, len(PROMPT) - 1 : -1]
    torch.testing.assert_close(torch.stack(rows), expected, atol=2e-3, rtol=1e-4)
    # Its most likely token after each of our tokens is our next one: it would have said the same.
    assert expected.argmax(dim=-1).tolist() == tokens[len(PROMPT) :]
