"""Two ranks on CUDA memory: the tokens of one rank, with turns taken through pinned host memory.

With one GPU both ranks share it, and sums go through the host, since NCCL wants a GPU for each rank: all that
differs from two GPUs is the collectives and the CUDA graphs around them. With two, both are the real ones.
"""

from __future__ import annotations

import math
import multiprocessing
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine.build import build_engine
from engine.config import Dtype, EngineConfig, MemoryConfig, ModelSource, SchedulerConfig
from engine.messages import EngineSnapshot, GenerateRequest, SamplingParams, TokenDelta
from engine.model.rank_group import RankGroup
from engine.tp.place import RankPlace
from tests.bench.models import write_llama_8b
from tests.fakes import Collected
from tests.unit.model_cases import save_tiny
from tests.unit.tp_cases import places

pytestmark = pytest.mark.gpu

PROMPTS = [tuple(random.Random(seed).choices(range(199), k=40 + 9 * seed)) for seed in range(12)]
PATIENCE_S = 180.0
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


def answers(config: EngineConfig, requests: list[GenerateRequest]) -> tuple[list[TokenDelta], EngineSnapshot]:
    """What each is answered, by an engine in a process of its own: NCCL is for one group in its life."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_be_the_first, args=(theirs, config, requests))
    process.start()
    try:
        assert ours.poll(PATIENCE_S), "the engine does not answer"
        deltas, snapshot = ours.recv()
    finally:
        process.kill()
    assert [delta.error for delta in deltas] == [None] * len(requests)
    return deltas, snapshot


def _be_the_first(answer: Any, config: EngineConfig, requests: list[GenerateRequest]) -> None:
    first, *others = places(config.tensor_parallel_size)
    spawn = multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=_be_a_rank, args=(config, place)) for place in others]
    for rank in ranks:
        rank.start()
    said = Collected()
    place = first if others else None
    engine = build_engine(config, said.take, place=place, group_class=_group_class(len(others) + 1))
    for request in requests:
        engine.submit(request)
    while engine.step():
        pass
    answer.send(([said[request.request_id] for request in requests], engine.snapshot))
    for rank in ranks:
        rank.kill()


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
    deltas, snapshot = answers(
        config, [GenerateRequest(str(index), prompt, SAMPLING) for index, prompt in enumerate(PROMPTS)]
    )
    return [delta.token_ids for delta in deltas], snapshot


@pytest.mark.timeout(600)
def test_two_ranks_say_what_one_says(tmp_path: Path) -> None:
    """float32, in plenty of memory and where sequences take turns."""
    save_tiny("llama", tmp_path)
    wanted, _ = serve(config(tmp_path, 1, 512, 0))
    assert serve(config(tmp_path, 2, 512, 0))[0] == wanted
    found, snapshot = serve(config(tmp_path, 2, 16, 256))  # eight chunks, one a sequence
    assert found == wanted
    assert snapshot.num_parkings > 0
    assert snapshot.memory.copied_in_bytes > 0


@pytest.mark.timeout(600)
def test_half_precision_is_as_close_on_two_ranks_as_on_one(tmp_path: Path) -> None:
    """An 8B shape of random weights in bfloat16, whose sums are in another order, against float32."""
    truth, one, two = (
        _log_probabilities(tmp_path, *what) for what in (("float32", 1), ("bfloat16", 1), ("bfloat16", 2))
    )
    errors = [_error(truth, found) for found in (one, two)]
    assert 0 < errors[1] < 1.3 * errors[0], errors


def _log_probabilities(folder: Path, dtype: Dtype, size: int) -> list[dict[int, float]]:
    """Of the likeliest tokens behind each of some prompts."""
    sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, logprobs=20)
    prompts = [tuple(random.Random(seed).choices(range(128000), k=100)) for seed in range(32)]
    settings = EngineConfig(
        ModelSource("llama-8b", str(write_llama_8b(folder)), load_format="dummy", dtype=dtype),
        MemoryConfig(pool_bytes=8 << 30, balloon_bytes=0),
        SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=512),
        device="cuda",
        max_model_len=1024,
        enforce_eager=not _has_a_gpu_each(size),
        tensor_parallel_size=size,
    )
    requests = [GenerateRequest(str(index), prompt, sampling) for index, prompt in enumerate(prompts)]
    return [dict(delta.logprobs[0].top) for delta in answers(settings, requests)[0]]


def _error(truth: list[dict[int, float]], found: list[dict[int, float]]) -> float:
    """Root of the mean square, over the tokens that both think likeliest."""
    squares = [
        (told[token] - right[token]) ** 2
        for right, told in zip(truth, found, strict=True)
        for token in right.keys() & told.keys()
    ]
    assert len(squares) > 5 * len(truth), "they do not even agree on what is likely"
    return math.sqrt(sum(squares) / len(squares))
