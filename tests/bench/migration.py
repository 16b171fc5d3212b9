"""How fast KV goes from one balloon to another, and how soon a request that moved goes on.

Both engines are in one process, so the figures are those of the transports and the protocol; the calls of
actors and of the ingress come on top. Run: `python -m tests.bench.migration [--model PATH]`, for a CPU, or
with `--gpu`: two engines of Llama-3.1-8B's shape on one GPU, and requests of a GiB.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import mmap
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from engine.build import build_engine
from engine.config import MIB, EngineConfig, MemoryConfig, ModelSource, SchedulerConfig, SloConfig
from engine.core import Engine
from engine.memory.kv_stream import KvStreams
from engine.messages import GenerateRequest, SamplingParams, TokenDelta
from engine.migration import Migrated
from engine.migrator import Migrator
from tests.bench.machine import machine
from tests.bench.models import write_llama_8b

_DEMO = Path.home() / ".cache/ballonet/SmolLM2-135M-Instruct.Q4_1.gguf"
_PATIENCE_S = 120.0


def transfer_rate(shares_memory: bool, chunk_bytes: int, count: int) -> float:
    """Bytes a second of so many chunks."""
    memory = [mmap.mmap(-1, chunk_bytes * count) for _ in range(2)]
    source, target = (ctypes.addressof(ctypes.c_char.from_buffer(one)) for one in memory)
    for base in (source, target):
        ctypes.memset(base, 1, chunk_bytes * count)  # pages are there, as in a pinned balloon
    streams = KvStreams("127.0.0.1", chunk_bytes, shares_memory)
    started = time.perf_counter()
    doors, coming = streams.listen([target + at * chunk_bytes for at in range(count)])
    going = streams.send(doors, [source + at * chunk_bytes for at in range(count)])
    going.wait()
    coming.wait()
    return chunk_bytes * count / (time.perf_counter() - started)


class _Sender:
    """No ingress: what was handed over is called for at once."""

    def __init__(self) -> None:
        self.handed: list[tuple[str, Migrated]] = []

    async def acknowledged(self, request_id: str) -> None:
        return

    def hand_over(self, request_id: str, migrated: Migrated) -> bool:
        self.handed.append((request_id, migrated))
        return True


class _Said:
    """When each request first said something here."""

    def __init__(self) -> None:
        self.first_s: dict[str, float] = {}

    def take(self, deltas: Sequence[TokenDelta]) -> None:
        for delta in deltas:
            self.first_s.setdefault(delta.request_id, time.perf_counter())


def _on_a_cpu(path: Path) -> EngineConfig:
    return EngineConfig(
        ModelSource("demo", str(path), dtype="float32"),
        MemoryConfig(pool_bytes=56 * MIB, balloon_bytes=256 * MIB, balloon_slab_bytes=256 * MIB),
        SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64, turn_tokens=8, min_retained_chunks=0),
        SloConfig(ttft_ms=2000, tpot_ms=1000),
        max_model_len=1024,
    )


def _on_a_gpu(folder: Path) -> EngineConfig:
    return EngineConfig(
        ModelSource("llama-8b", str(write_llama_8b(folder)), load_format="dummy"),
        MemoryConfig(pool_bytes=4096 * MIB, balloon_bytes=12_288 * MIB),
        SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=4096),
        SloConfig(ttft_ms=2000, tpot_ms=150),
        device="cuda",
        max_model_len=16_384,
    )


def _engine(config: EngineConfig, said: _Said) -> Engine:
    engine = build_engine(config, said.take)
    give_up = time.perf_counter() + _PATIENCE_S
    while (memory := engine.snapshot.memory).balloon_physical < memory.balloon_limit:
        assert time.perf_counter() < give_up, memory
        engine.step()
        time.sleep(0.01)
    return engine


async def _move(source: Engine, target: Engine, said: _Said) -> tuple[float, float, int]:
    """Seconds from the order until the source let go, until the first token there, and the bytes."""
    sender = _Sender()
    out = Migrator(source, sender, lambda _: True)  # type: ignore[arg-type]
    there = Migrator(target, _Sender(), lambda _: True)  # type: ignore[arg-type]
    give_up = time.perf_counter() + _PATIENCE_S
    while True:
        started = time.perf_counter()
        result = await out.send(there, "other")
        if result.outcome == "migrated":
            break
        assert result.outcome == "not_movable", result
        assert time.perf_counter() < give_up, result
        await asyncio.sleep(0.01)
    ((name, migrated),) = sender.handed
    await there.adopt(migrated.migration_id)
    while name not in said.first_s:
        assert time.perf_counter() < give_up
        await asyncio.sleep(0.001)
    return result.seconds, said.first_s[name] - started, result.num_bytes


def first_tokens(
    config: EngineConfig, requests: int, prompt_tokens: int, rounds: int
) -> list[tuple[float, float, int]]:
    """Requests that move out of a crowded engine into an idle one, one after another."""
    said = [_Said(), _Said()]
    engines = [_engine(config, one) for one in said]
    stop = threading.Event()
    threads = [threading.Thread(target=one.run_until, args=(stop,)) for one in engines]
    for thread in threads:
        thread.start()
    for at in range(requests):
        prompt = tuple(random.Random(at).choices(range(1000, 40_000), k=prompt_tokens))
        sampling = SamplingParams(max_tokens=500, temperature=0.0, ignore_eos=True)
        engines[0].submit(GenerateRequest(f"r{at}", prompt, sampling, unpaced=True))
    try:
        return [asyncio.run(_move(*engines, said[1])) for _ in range(rounds)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=_DEMO)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, float] = {}
    for chunk_bytes in (512 << 10, 2 << 20):
        rates: dict[str, list[float]] = {"shared memory": [], "stream": []}
        for _ in range(options.rounds):  # in turn, so that other work of the machine falls on both
            for name in rates:
                count = (256 << 20) // chunk_bytes
                rates[name].append(transfer_rate(name == "shared memory", chunk_bytes, count))
        for name, some in rates.items():
            found[f"{name}, {chunk_bytes >> 10} KiB, GiB/s"] = statistics.median(some) / 2**30
    print(json.dumps({name: round(value, 3) for name, value in found.items()}), flush=True)
    found.clear()
    with tempfile.TemporaryDirectory() as folder:
        config = _on_a_gpu(Path(folder)) if options.gpu else _on_a_cpu(options.model)
        moves = first_tokens(config, *((12, 8000) if options.gpu else (5, 200)), options.rounds)
    found["order to let go, ms"] = statistics.median(one[0] for one in moves) * 1e3
    found["order to first token, ms"] = statistics.median(one[1] for one in moves) * 1e3
    found["MiB a request"] = statistics.median(one[2] for one in moves) / 2**20
    print(json.dumps({name: round(value, 3) for name, value in found.items()} | machine()))


if __name__ == "__main__":
    main()
