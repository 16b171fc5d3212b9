"""Every model family through the whole engine: transformers' greedy tokens, in tiny chunks and pieces."""

from __future__ import annotations

import gc
import os
import random
from pathlib import Path

import pytest
import torch

from engine.build import build_engine
from engine.config import EngineConfig, MemoryConfig, ModelSource, SchedulerConfig
from engine.errors import ConfigError
from engine.messages import GenerateRequest, SamplingParams
from tests.fakes import Collected
from tests.unit.model_cases import FAMILY_MODELS, save_tiny

NUM_TOKENS = 40
PROMPTS = [tuple(random.Random(seed).choices(range(199), k=5 + 9 * seed)) for seed in range(6)]


def config(directory: Path, pool_kib: int, piece: int | None, **options: int) -> EngineConfig:
    return EngineConfig(
        ModelSource("tiny", str(directory)),
        MemoryConfig(pool_bytes=pool_kib * 1024, chunk_bytes=4096),
        SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=48, prefill_piece_tokens=piece),
        max_model_len=options.get("max_model_len", 96),
    )


@torch.inference_mode()
def _greedy(model: torch.nn.Module, prompt: tuple[int, ...]) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    for _ in range(NUM_TOKENS):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return tuple(ids[0, len(prompt) :].tolist())


@pytest.mark.parametrize("family", FAMILY_MODELS)
@pytest.mark.parametrize(("pool_kib", "piece"), [(4096, None), (4096, 7), (160, 16)])
def test_greedy_tokens_equal_transformers(
    family: str, pool_kib: int, piece: int | None, tmp_path: Path
) -> None:
    model = save_tiny(family, tmp_path)
    said = Collected()
    engine = build_engine(config(tmp_path, pool_kib, piece), said.take)
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    for index, prompt in enumerate(PROMPTS):
        engine.submit(GenerateRequest(str(index), prompt, sampling))
    while engine.step():
        pass
    for index, prompt in enumerate(PROMPTS):
        assert said[str(index)].token_ids == _greedy(model, prompt)
    memory = engine.snapshot.memory
    assert memory.free + memory.cached + memory.activation + memory.guard == memory.total
    assert (engine.snapshot.num_preemptions > 0) == (pool_kib == 160)


def test_a_dropped_engine_gives_its_memory_back(tmp_path: Path) -> None:
    """Nothing has to be closed; parts that refer to one another wait for the collector, as ever."""
    save_tiny("llama", tmp_path)
    engine = build_engine(config(tmp_path, 4096, None), Collected().take)
    engine.submit(GenerateRequest("a", PROMPTS[0], SamplingParams(max_tokens=NUM_TOKENS)))
    engine.step()
    pool_file = os.fstat(engine._pool._vm._file.fileno()).st_ino  # type: ignore[attr-defined]
    assert _num_mapped(pool_file) > 0
    del engine
    gc.collect()
    assert _num_mapped(pool_file) == 0


def _num_mapped(inode: int) -> int:
    with open("/proc/self/maps") as maps:
        return sum(f" {inode} " in line and "ballonet-pool" in line for line in maps)


def test_a_pool_too_small_for_one_sequence_says_what_to_set(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    with pytest.raises(ConfigError, match=r"set memory\.pool_bytes to at least (\d+)") as caught:
        build_engine(config(tmp_path, 32, None), Collected().take)
    least = int(str(caught.value).split("at least ")[1].split()[0])
    build_engine(config(tmp_path, least // 1024, None), Collected().take)


def test_a_context_beyond_the_model_is_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    with pytest.raises(ConfigError, match="max_model_len"):
        build_engine(config(tmp_path, 4096, None, max_model_len=100_000), Collected().take)


def test_more_host_memory_than_there_is_is_refused_before_it_kills(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    with pytest.raises(ConfigError, match="available"):
        build_engine(
            EngineConfig(
                ModelSource("tiny", str(tmp_path)), MemoryConfig(pool_bytes=1 << 50, chunk_bytes=1 << 40)
            ),
            Collected().take,
        )
