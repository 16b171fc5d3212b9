"""A decode step of Llama-3.1-8B's shape on one GPU and on several, at one batch size.

Ranks are processes here; the first is this one. What is reported is the median time between two steps of a
steady batch, and its floor: the weights and the KV of a rank, read once.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from engine.build import build_engine
from engine.config import EngineConfig, MemoryConfig, ModelSource, SchedulerConfig
from engine.messages import GenerateRequest, SamplingParams, TokenDelta
from engine.tp.place import RankPlace
from tests.bench.machine import machine
from tests.bench.models import write_llama_8b

_STEPS = 200
_SETTLE = 40
_BYTES_PER_S = {"H100": 3.35e12, "H200": 4.8e12}  # data sheets


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of context before the decodes")
    args = parser.parse_args()
    figures = {size: _in_a_process(size, args.batch, args.prompt) for size in args.sizes}
    line = {"bench": "tp_decode", "batch": args.batch, "prompt": args.prompt, "ranks": figures}
    print(json.dumps({**line, **machine()}))


def _in_a_process(*what: int) -> dict[str, Any]:
    """Every engine has its own: NCCL is for one group in a process' life."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_measure_there, args=(theirs, *what))
    process.start()
    result: dict[str, Any] = ours.recv()
    process.join()
    return result


def _measure_there(answer: Any, *what: int) -> None:
    answer.send(measure(*what))
    os._exit(0)


def measure(size: int, batch: int, prompt: int) -> dict[str, Any]:
    """Milliseconds of a step."""
    with tempfile.TemporaryDirectory() as folder:
        config = EngineConfig(
            ModelSource("llama-8b", str(write_llama_8b(Path(folder))), load_format="dummy"),
            MemoryConfig(balloon_bytes=0),
            SchedulerConfig(max_num_seqs=batch, max_num_batched_tokens=4096),
            device="cuda",
            tensor_parallel_size=size,
        )
        directory = tempfile.mkdtemp()
        spawn = multiprocessing.get_context("spawn")
        ranks = [
            spawn.Process(target=_be_a_rank, args=(config, RankPlace(rank, size, directory)), daemon=True)
            for rank in range(1, size)
        ]
        for rank in ranks:
            rank.start()
        place = RankPlace(0, size, directory) if size > 1 else None
        engine = build_engine(config, _ignore, place=place)
        gc.collect()
        gc.freeze()
    for index in range(batch):
        tokens = torch.randint(0, 128000, (prompt,), generator=torch.Generator().manual_seed(index)).tolist()
        sampling = SamplingParams(max_tokens=_STEPS + 2 * _SETTLE, temperature=0.0, ignore_eos=True)
        engine.submit(GenerateRequest(str(index), tuple(tokens), sampling))
    ends = []
    while engine.step():
        if engine.snapshot.num_running == batch and engine.snapshot.num_waiting == 0:
            ends.append(time.perf_counter())
    steps = [later - earlier for earlier, later in zip(ends[_SETTLE:-1], ends[_SETTLE + 1 :], strict=True)]
    nbytes = engine.info.weight_bytes + batch * (prompt + _STEPS / 2) * 32 * 2 * 8 * 128 * 2 / size
    name = next((one for one in _BYTES_PER_S if one in torch.cuda.get_device_name()), None)
    result = {
        "step_ms": round(median(steps) * 1e3, 3),
        "steps": len(steps),
        "floor_ms": round(nbytes / _BYTES_PER_S[name] * 1e3, 3) if name else None,
        "weight_gib": round(engine.info.weight_bytes / 2**30, 2),
    }
    for rank in ranks:
        rank.kill()
    return result


def _be_a_rank(config: EngineConfig, place: RankPlace) -> None:
    from engine.tp.follower import follow

    torch.cuda.set_device(place.rank)
    follow(config, place)


def _ignore(deltas: list[TokenDelta]) -> None:
    pass


if __name__ == "__main__":
    main()
