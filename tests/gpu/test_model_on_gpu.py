"""The real engine on a GPU: the demo model's words, and a Llama-3.1-8B shape under load."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from engine.build import build_engine
from engine.config import EngineConfig, MemoryConfig, ModelSource, SchedulerConfig
from engine.messages import GenerateRequest, SamplingParams
from tests.bench.models import write_llama_8b
from tests.fakes import Collected

pytestmark = pytest.mark.gpu


@pytest.mark.model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_demo_model_knows_the_capital_of_france(demo_model_path: Path, dtype: str) -> None:
    from cluster.tokenizer import Tokenizer

    collector = Collected()
    source = ModelSource("demo", str(demo_model_path), dtype=dtype)  # type: ignore[arg-type]
    config = EngineConfig(
        source, MemoryConfig(pool_bytes=1 << 30), SchedulerConfig(max_num_seqs=8), device="cuda"
    )
    engine = build_engine(config, collector.take)
    tokenizer = Tokenizer.load(str(demo_model_path))
    text = tokenizer.render_chat([{"role": "user", "content": "What is the capital of France?"}])
    prompt = tokenizer.encode(text, add_special_tokens=False)
    engine.submit(GenerateRequest("q", tuple(prompt), SamplingParams(max_tokens=32, temperature=0.0)))
    while engine.step():
        pass
    assert "Paris" in tokenizer.decode(collector["q"].token_ids)


@pytest.mark.timeout(600)
def test_llama_8b_shape_serves_64_requests(tmp_path: Path) -> None:
    collector = Collected()
    started = time.perf_counter()
    engine = build_engine(
        EngineConfig(
            ModelSource("llama-8b", str(write_llama_8b(tmp_path)), load_format="dummy"),
            scheduler=SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=4096),
            device="cuda",
        ),
        collector.take,
    )
    ready_s = time.perf_counter() - started
    generator = torch.Generator().manual_seed(1)
    for index in range(64):
        prompt = torch.randint(0, 128000, (512,), generator=generator).tolist()
        sampling = SamplingParams(
            max_tokens=128, temperature=0.0 if index % 2 else 0.8, seed=index, ignore_eos=True
        )
        engine.submit(GenerateRequest(str(index), tuple(prompt), sampling))
    started = time.perf_counter()
    while engine.step():
        pass
    wall_s = time.perf_counter() - started
    memory = engine.snapshot.memory
    assert len(collector) == 64
    assert all(len(delta.token_ids) == 128 for delta in collector.values())
    assert all(delta.finish_reason == "length" for delta in collector.values())
    engine._pool.check()
    assert memory.kv == 0
    print(
        f"\nready {ready_s:.1f} s; 64 x (512 + 128): {64 * 128 / wall_s:.0f} output tok/s\n"
        f"{engine.info}\n{memory}"
    )
