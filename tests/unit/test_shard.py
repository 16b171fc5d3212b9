"""A model divided among ranks computes what the whole one does, whether or not its parts divide."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.config import EngineConfig, ModelSource
from engine.errors import ConfigError
from engine.model.buffers import activation_specs
from engine.model.config import load_model_config
from engine.model.loader import load_model, read_model
from engine.model.runner import ModelRunner
from engine.model.shard import Shard
from tests.unit.model_cases import FAMILY_MODELS, PlainArena, ScrambledKv, piece, plan, save_tiny
from tests.unit.tp_cases import ThreadGroup, places

TOKENS = [3, 141, 59, 26, 53, 58, 97, 93, 23, 84, 62, 64, 33, 83, 27, 95]


def logits(directory: Path, size: int) -> list[torch.Tensor]:
    """Of a prompt in two pieces beside another one, and of a decode, as each rank has them."""
    found: list[torch.Tensor | None] = [None] * size
    group = places(size)
    threads = [threading.Thread(target=_compute, args=(directory, place, found)) for place in group]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [one for one in found if one is not None]


def _compute(directory: Path, place, found: list[torch.Tensor | None]) -> None:
    config = EngineConfig(ModelSource("tiny", str(directory)), tensor_parallel_size=place.size)
    facts = read_model(config, place.rank)
    ranks = ThreadGroup(place.rank, place.size, place.store, facts.device) if place.size > 1 else None
    model = load_model(config, facts, ranks)
    kv = ScrambledKv(facts.shard.local, (1, 0), slot_tokens=64, tokens_per_row=8)
    arena = PlainArena(activation_specs(facts.shard, facts.dtype, facts.kernels))
    seats = torch.zeros(8, dtype=torch.int64)
    runner = ModelRunner(model.decoder, arena, kv, facts.device, seats, 512, 8, ranks)
    first = runner.run(plan(piece(0, TOKENS, 0, 9, samples=False), piece(1, TOKENS[::-1], 0, 11))).clone()
    second = runner.run(plan(piece(1, TOKENS[::-1], 11, 12), piece(0, TOKENS, 9, 14)))
    found[place.rank] = torch.cat([first, second])


@pytest.mark.parametrize("family", FAMILY_MODELS)
@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_ranks_together_compute_what_one_does(family: str, size: int, tmp_path: Path) -> None:
    save_tiny(family, tmp_path)
    whole = logits(tmp_path, 1)[0]
    of_ranks = logits(tmp_path, size)
    assert len(of_ranks) == size
    for found in of_ranks:
        torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(9, 3, 2), (9, 3, 4), (14, 2, 4), (8, 8, 3), (7, 1, 7)]
)
def test_heads_that_do_not_divide(heads: int, kv_heads: int, size: int, tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=199,
        hidden_size=16 * heads,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).float().save_pretrained(tmp_path)
    whole = logits(tmp_path, 1)[0]
    for found in logits(tmp_path, size):
        torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", range(1, 9))
def test_shares_cover_the_model_once(size: int, tmp_path: Path) -> None:
    """Every row of every matrix is some rank's; keys and values alone may be several ranks'."""
    save_tiny("llama", tmp_path)
    whole = load_model_config(ModelSource("tiny", str(tmp_path)))
    if size > whole.num_heads:
        with pytest.raises(ConfigError, match="6 attention heads"):
            Shard(whole, 0, size)
        return
    shards = [Shard(whole, rank, size) for rank in range(size)]
    for name in ("queries", "inner", "tokens"):
        spans = [getattr(shard, name) for shard in shards]
        rows = [row for span in spans for row in range(span.begin, span.begin + span.count)]
        assert sorted(rows) == list(range(spans[0].whole)), name
        assert len({span.size for span in spans}) == 1
    dim = whole.head_dim
    for shard in shards:
        first, keys = shard.queries.begin // dim, shard.keys
        per_kv = shard.local.num_heads // shard.local.num_kv_heads
        for head in range(shard.queries.count // dim):  # each query head is beside its own KV head
            assert (first + head) // 3 == keys.begin // dim + head // per_kv


def test_dummy_weights_are_one_model(tmp_path: Path) -> None:
    save_tiny("qwen3", tmp_path)
    found = {}
    for size in (1, 2):
        source = ModelSource("tiny", str(tmp_path), load_format="dummy", seed=5)
        parts = []
        for rank in range(size):
            config = EngineConfig(source, tensor_parallel_size=size)
            parts.append(load_model(config, read_model(config, rank)).decoder._weights)
        found[size] = parts
    whole, (first, second) = found[1][0], found[2]
    together = torch.cat([first.embedding, second.embedding])[: len(whole.embedding)]
    assert torch.equal(together, whole.embedding)
