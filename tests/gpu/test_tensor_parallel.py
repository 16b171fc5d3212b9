"""Two ranks on CUDA memory: the tokens of one rank, with turns taken through pinned host memory.

With one GPU both ranks share it, and sums go through the host, since NCCL wants a GPU for each rank: all that
differs from two GPUs is the collectives and the CUDA graphs around them. With two, both are the real ones.
"""

from __future__ import annotations

import gc
import multiprocessing
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engine.build import build_engine
from engine.config import EngineConfig, MemoryConfig, ModelSource, SchedulerConfig
from engine.core import Engine
from engine.messages import EngineSnapshot, GenerateRequest, SamplingParams
from engine.model.rank_group import RankGroup
from engine.tp.place import RankPlace
from tests.bench.models import write_llama_8b
from tests.fakes import Collected
from tests.unit.model_cases import save_tiny
from tests.unit.tp_cases import places

pytestmark = pytest.mark.gpu

PROMPTS = [tuple(random.Random(seed).choices(range(199), k=40 + 9 * seed)) for seed in range(12)]
SAMPLING = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)


class ThroughTheHost(RankGroup):
    """The same sums by gloo, in host memory."""

    backend = "gloo"

    def sum(self, tensor: torch.Tensor) -> None:
        here = tensor.cpu()
        dist.all_reduce(here)
        tensor.copy_(here)

    def spread(self, tensor: torch.Tensor) -> None:
        here = tensor.cpu()
        dist.broadcast(here, src=0)
        tensor.copy_(here)

    def join(self, part: torch.Tensor, parts: torch.Tensor) -> None:
        here = torch.empty(parts.shape, dtype=parts.dtype)
        dist.all_gather_into_tensor(here.view(-1), part.cpu().view(-1))
        parts.copy_(here)


def _has_a_gpu_each(size: int) -> bool:
    return torch.cuda.device_count() >= size


def _group_class(size: int) -> type[RankGroup]:
    return RankGroup if _has_a_gpu_each(size) else ThroughTheHost


def _be_a_rank(config: EngineConfig, place: RankPlace) -> None:
    from engine.tp.follower import follow

    if _has_a_gpu_each(place.size):
        torch.cuda.set_device(place.rank)
    follow(config, place, _group_class(place.size))


@contextmanager
def engine_of(config: EngineConfig, said: Collected) -> Iterator[Engine]:
    """An engine with its other ranks in processes of their own, which end with it."""
    first, *others = places(config.tensor_parallel_size)
    spawn = multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=_be_a_rank, args=(config, place), daemon=True) for place in others]
    for rank in ranks:
        rank.start()
    place = first if others else None
    engine = build_engine(config, said.take, place=place, group_class=_group_class(len(others) + 1))
    yield engine
    engine._pool._vm.close()
    del engine
    gc.collect()
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0


def config(
    directory: Path, size: int, pool_mib: int, balloon_mib: int, dtype: str = "float32"
) -> EngineConfig:
    return EngineConfig(
        ModelSource("tiny", str(directory), dtype="float32"),
        MemoryConfig(pool_bytes=pool_mib << 20, balloon_bytes=balloon_mib << 20, balloon_slab_bytes=32 << 20),
        SchedulerConfig(max_num_seqs=12, max_num_batched_tokens=128, min_retained_chunks=0),
        device="cuda",
        max_model_len=250,
        enforce_eager=not _has_a_gpu_each(size),
        tensor_parallel_size=size,
    )


def serve(config: EngineConfig) -> tuple[list[tuple[int, ...]], EngineSnapshot]:
    said = Collected()
    with engine_of(config, said) as engine:
        for index, prompt in enumerate(PROMPTS):
            engine.submit(GenerateRequest(str(index), prompt, SAMPLING))
        while engine.step():
            pass
        snapshot = engine.snapshot
    assert [said[str(index)].error for index in range(len(PROMPTS))] == [None] * len(PROMPTS)
    return [said[str(index)].token_ids for index in range(len(PROMPTS))], snapshot


@pytest.mark.timeout(600)
def test_two_ranks_say_what_one_says(tmp_path: Path) -> None:
    """float32, in plenty of memory and where sequences take turns; prefixes stay on all ranks."""
    save_tiny("llama", tmp_path)
    wanted, _ = serve(config(tmp_path, 1, 512, 0))
    assert serve(config(tmp_path, 2, 512, 0))[0] == wanted
    found, snapshot = serve(config(tmp_path, 2, 16, 256))  # eight chunks, one a sequence
    assert found == wanted
    assert snapshot.num_parkings > 0
    assert snapshot.memory.copied_in_bytes > 0


@pytest.mark.timeout(600)
def test_half_precision_differs_by_rounding_alone(tmp_path: Path) -> None:
    """An 8B shape of random weights in bfloat16: the first tokens mostly agree, sums are in another order."""
    write_llama_8b(tmp_path)
    found = []
    for size in (1, 2):
        settings = EngineConfig(
            ModelSource("llama-8b", str(tmp_path), load_format="dummy"),
            MemoryConfig(pool_bytes=8 << 30, balloon_bytes=0),
            SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=512),
            device="cuda",
            max_model_len=1024,
            enforce_eager=not _has_a_gpu_each(size),
            tensor_parallel_size=size,
        )
        said = Collected()
        with engine_of(settings, said) as engine:
            for index in range(16):
                prompt = tuple(random.Random(index).choices(range(128000), k=100))
                sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=5)
                engine.submit(GenerateRequest(str(index), prompt, sampling))
            while engine.step():
                pass
        found.append([said[str(index)].logprobs[0] for index in range(16)])
    for one, two in zip(*found, strict=True):
        assert abs(one.top[0][1] - two.top[0][1]) < 0.1
