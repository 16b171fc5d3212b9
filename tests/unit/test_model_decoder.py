"""The decoder against transformers: same logits, however a prompt reaches it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig, ModelSource
from engine.errors import ConfigError
from engine.model.buffers import activation_specs
from engine.model.loader import LoadedModel, load_model
from engine.model.runner import ModelRunner
from tests.unit.model_cases import FAMILY_MODELS, ScrambledKv, make_runner, piece, plan, save_tiny

LENGTHS = (37, 23, 1, 16)
TOKENS_PER_ROW = 8


@pytest.fixture(params=FAMILY_MODELS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, LoadedModel]:
    reference = save_tiny(request.param, tmp_path)
    return reference, load_model(EngineConfig(ModelSource("tiny", str(tmp_path)), max_model_len=128))


def prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]


def expected(reference: Any, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return reference(torch.tensor([tokens])).logits[0]


def runner_of(model: LoadedModel) -> ModelRunner:
    kv = ScrambledKv(model.facts.config, (2, 0, 3, 1), slot_tokens=64, tokens_per_row=TOKENS_PER_ROW)
    return make_runner(
        model.decoder, activation_specs(model.facts.shard, model.facts.dtype, model.facts.kernels), kv
    )


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_whole_prompts_in_one_step(pair: tuple[Any, LoadedModel]) -> None:
    reference, model = pair
    texts = prompts(model.facts.config.vocab_size)
    # A prompt of one token is a piece of one token: it comes first, as a decode.
    order = sorted(range(4), key=lambda slot: LENGTHS[slot] > 1)
    logits = runner_of(model).run(plan(*(piece(s, texts[s], 0, LENGTHS[s]) for s in order)))
    assert_close(logits, torch.stack([expected(reference, texts[slot])[-1] for slot in order]))


def test_pieces_of_odd_sizes_beside_decodes(pair: tuple[Any, LoadedModel]) -> None:
    reference, model = pair
    first, second = prompts(model.facts.config.vocab_size)[:2]
    runner = runner_of(model)
    assert runner.run(plan(piece(0, first, 0, 13, samples=False))).shape == (0, model.facts.config.vocab_size)
    runner.run(plan(piece(0, first, 13, 14, samples=False), piece(1, second, 0, 17, samples=False)))
    logits = runner.run(plan(piece(1, second, 17, 18), piece(0, first, 14, 37)))
    assert_close(logits[0], expected(reference, second)[17])
    assert_close(logits[1], expected(reference, first)[36])


def test_token_by_token(pair: tuple[Any, LoadedModel]) -> None:
    reference, model = pair
    texts = [text for text in prompts(model.facts.config.vocab_size) if len(text) >= 16]
    wanted = [expected(reference, text) for text in texts]
    runner = runner_of(model)
    for at in range(16):
        logits = runner.run(plan(*(piece(slot, text, at, at + 1) for slot, text in enumerate(texts))))
        assert_close(logits, torch.stack([rows[at] for rows in wanted]))


def test_only_sampling_pieces_get_rows(pair: tuple[Any, LoadedModel]) -> None:
    reference, model = pair
    first, second = prompts(model.facts.config.vocab_size)[:2]
    logits = runner_of(model).run(plan(piece(0, first, 0, 20, samples=False), piece(1, second, 0, 23)))
    assert logits.shape == (1, model.facts.config.vocab_size)
    assert_close(logits[0], expected(reference, second)[-1])


def test_more_tokens_than_one_product_takes(tmp_path: Path) -> None:
    # Over 256 rows the CPU multiplies in pieces.
    reference = save_tiny("mistral", tmp_path)
    reference.config.max_position_embeddings = 256
    model = load_model(EngineConfig(ModelSource("tiny", str(tmp_path))))
    tokens = torch.randint(0, 199, (256,), generator=torch.Generator().manual_seed(5)).tolist()
    kv = ScrambledKv(model.facts.config, (1, 0), slot_tokens=256, tokens_per_row=32)
    runner = make_runner(
        model.decoder, activation_specs(model.facts.shard, model.facts.dtype, model.facts.kernels), kv
    )
    logits = runner.run(plan(piece(0, tokens, 0, 256), piece(1, tokens, 0, 200)))
    wanted = expected(reference, tokens)
    assert_close(logits, wanted[[255, 199]])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near(tmp_path: Path, dtype: Any) -> None:
    reference = save_tiny("qwen2", tmp_path)
    model = load_model(EngineConfig(ModelSource("tiny", str(tmp_path), dtype=dtype)))
    tokens = prompts(model.facts.config.vocab_size)[0]
    kv = ScrambledKv(model.facts.config, (0,), slot_tokens=64, tokens_per_row=TOKENS_PER_ROW)
    kv.layer_views = tuple(view.to(model.facts.dtype) for view in kv.layer_views)
    runner = make_runner(
        model.decoder, activation_specs(model.facts.shard, model.facts.dtype, model.facts.kernels), kv
    )
    logits = runner.run(plan(piece(0, tokens, 0, len(tokens))))
    assert logits.dtype == model.facts.dtype
    wanted = expected(reference, tokens)[-1]
    assert (logits[0].float() - wanted).norm() < 0.05 * wanted.norm()


def test_dummy_weights_follow_the_seed(tmp_path: Path) -> None:
    save_tiny("qwen3", tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()

    def logits(seed: int) -> torch.Tensor:
        source = ModelSource("tiny", str(tmp_path), load_format="dummy", seed=seed)
        model = load_model(EngineConfig(source, max_model_len=128))
        return runner_of(model).run(plan(piece(0, list(range(10)), 0, 10)))

    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))
    assert torch.isfinite(logits(1)).all()


def test_max_model_len_past_the_sliding_window_is_refused(tmp_path: Path) -> None:
    from transformers import MistralConfig

    MistralConfig(sliding_window=64, max_position_embeddings=256, num_hidden_layers=1).save_pretrained(
        tmp_path
    )
    config = EngineConfig(ModelSource("m", str(tmp_path), load_format="dummy"), max_model_len=65)
    with pytest.raises(ConfigError, match="64 tokens, its sliding window"):
        load_model(config)
