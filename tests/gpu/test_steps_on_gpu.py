"""Steps on a GPU: graphs say what eager kernels say, and a steady decode allocates nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.build import build_engine
from engine.config import EngineConfig, MemoryConfig, ModelSource, SchedulerConfig
from engine.core import Engine
from engine.messages import GenerateRequest, SamplingParams
from tests.fakes import Collected

pytestmark = [pytest.mark.gpu, pytest.mark.model]

PROMPTS = [
    tuple(100 + (37 * index * (place + 1)) % 40000 for index in range(5 + 9 * place)) for place in range(8)
]


def build(path: Path, collector: Collected, enforce_eager: bool = False) -> Engine:
    return build_engine(
        EngineConfig(
            ModelSource("demo", str(path), dtype="float32"),
            MemoryConfig(pool_bytes=1 << 30),
            SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=256),
            device="cuda",
            max_model_len=2048,
            enforce_eager=enforce_eager,
        ),
        collector.take,
    )


def submit(engine: Engine, name: str, prompt: tuple[int, ...], count: int, **sampling: object) -> None:
    params = SamplingParams(max_tokens=count, ignore_eos=True, **sampling)  # type: ignore[arg-type]
    engine.submit(GenerateRequest(name, prompt, params))


def run(engine: Engine) -> None:
    while engine.step():
        pass


@pytest.fixture(scope="module")
def alone(demo_model_path: Path) -> list[tuple[int, ...]]:
    """What each prompt is answered by itself, without graphs."""
    collector = Collected()
    engine = build(demo_model_path, collector, enforce_eager=True)
    for index, prompt in enumerate(PROMPTS):
        submit(engine, str(index), prompt, 24 + index, temperature=0.0)
        run(engine)
    return [collector[str(index)].token_ids for index in range(len(PROMPTS))]


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_every_request_of_a_changing_batch_gets_its_own_tokens(
    demo_model_path: Path, alone: list[tuple[int, ...]], enforce_eager: bool
) -> None:
    collector = Collected()
    engine = build(demo_model_path, collector, enforce_eager)
    for index, prompt in enumerate(PROMPTS):
        submit(engine, str(index), prompt, 24 + index, temperature=0.0)
        for _ in range(3):  # the batch grows, is mixed with prefills, shrinks
            engine.step()
    run(engine)
    for index, tokens in enumerate(alone):
        assert collector[str(index)].token_ids == tokens, index
    engine._pool.check()
    assert engine.snapshot.memory.kv == 0


def test_seeded_sampling_is_the_same_alone_and_in_company(demo_model_path: Path) -> None:
    settings = [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.2, "top_k": 20, "min_p": 0.02},
        {"temperature": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    ]
    said: list[dict[str, tuple[int, ...]]] = []
    for together in (False, True):
        collector = Collected()
        engine = build(demo_model_path, collector)
        for index, options in enumerate(settings):
            submit(engine, str(index), PROMPTS[index], 32, seed=index, **options)
            if not together:
                run(engine)
        run(engine)
        said.append({name: delta.token_ids for name, delta in collector.items()})
    assert said[0] == said[1]


def test_a_steady_decode_allocates_nothing_and_calls_no_driver(demo_model_path: Path) -> None:
    engine = build(demo_model_path, Collected())
    for index in range(5):
        options = {"top_p": 0.9, "top_k": 50} if index % 2 else {"temperature": 0.0}
        submit(engine, str(index), PROMPTS[index], 120, **options)
    for _ in range(12):
        engine.step()
    torch.cuda.synchronize()
    calls = engine.snapshot.memory.driver_calls
    allocations = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(15):
        engine.step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocations
    assert engine.snapshot.memory.driver_calls == calls
    run(engine)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_steps_wait_for_the_device_in_one_place_only(demo_model_path: Path) -> None:
    """Launching a step must not synchronise: torch raises if anything in it does."""
    engine = build(demo_model_path, Collected())
    for index in range(4):
        submit(engine, str(index), PROMPTS[index], 40, top_p=0.9, logprobs=2, presence_penalty=0.5)
    for _ in range(10):
        engine.step()
    plan = engine._schedule_and_reserve()
    assert plan is not None
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine._launch(plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    run(engine)
