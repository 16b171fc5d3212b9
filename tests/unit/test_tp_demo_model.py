"""The demo model on ranks in processes of their own, with gloo between them: the tokens of one rank."""

from __future__ import annotations

import gc
import multiprocessing
from pathlib import Path

import pytest

from engine.build import build_engine
from engine.config import EngineConfig, MemoryConfig, ModelSource, SchedulerConfig
from engine.core import Engine
from engine.messages import GenerateRequest, SamplingParams
from engine.tp.follower import follow
from tests.fakes import Collected
from tests.unit.tp_cases import places

pytestmark = pytest.mark.model

PROMPTS = [tuple(range(start, start + length)) for start, length in ((100, 40), (900, 75), (3000, 9))]
SAMPLING = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)


def config(model: Path, size: int) -> EngineConfig:
    return EngineConfig(
        ModelSource("demo", str(model), dtype="float32"),
        MemoryConfig(pool_bytes=64 << 20),
        SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64),
        max_model_len=256,
        num_threads=1,
        tensor_parallel_size=size,
    )


def answers(engine: Engine, said: Collected) -> list[tuple[int, ...]]:
    for index, prompt in enumerate(PROMPTS):
        engine.submit(GenerateRequest(str(index), prompt, SAMPLING))
    while engine.step():
        pass
    return [said[str(index)].token_ids for index in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def wanted(demo_model_path: Path) -> list[tuple[int, ...]]:
    said = Collected()
    return answers(build_engine(config(demo_model_path, 1), said.take), said)


@pytest.mark.parametrize("size", [2, 4])
def test_tokens_are_those_of_one_rank(
    size: int, demo_model_path: Path, wanted: list[tuple[int, ...]]
) -> None:
    """Nine query heads over three KV heads divide by neither."""
    settings, (first, *others) = config(demo_model_path, size), places(size)
    spawn = multiprocessing.get_context("spawn")  # a fork would have torch's threads half
    ranks = [spawn.Process(target=follow, args=(settings, place), daemon=True) for place in others]
    for rank in ranks:
        rank.start()
    said = Collected()
    engine = build_engine(settings, said.take, place=first)
    assert answers(engine, said) == wanted
    del engine
    gc.collect()
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0, "a rank ends with the engine"
