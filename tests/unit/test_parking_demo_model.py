"""The demo model says the same in a pool too small for its load as in one with plenty, token for token."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from engine.build import build_engine
from engine.config import MIB, EngineConfig, MemoryConfig, ModelSource, SchedulerConfig, SloConfig
from engine.core import Engine
from engine.messages import GenerateRequest, SamplingParams
from tests.fakes import Collected, FakeClock

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

CHUNK_BYTES = 64 * 1024
NUM_TOKENS = 60
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
# Penalties read what was said before, and each draw has its number: both have to survive a turn of others.
SEEDED = SamplingParams(
    max_tokens=NUM_TOKENS,
    temperature=0.9,
    top_p=0.95,
    seed=7,
    repetition_penalty=1.2,
    presence_penalty=0.4,
    frequency_penalty=0.3,
    ignore_eos=True,
)


def requests() -> list[GenerateRequest]:
    """Three of a kind, with a common beginning in two of them."""
    dice = random.Random(1)
    stem = dice.choices(range(1000, 40_000), k=60)
    made = []
    for name, sampling in (("greedy", GREEDY), ("seeded", SEEDED)):
        for at in range(3):
            own = dice.choices(range(1000, 40_000), k=dice.randrange(30, 120))
            made.append(GenerateRequest(f"{name}{at}", (*(stem if at else ()), *own), sampling))
    return made


TURNS = SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=64, turn_tokens=2, min_retained_chunks=0)
LAYER_WISE = SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=256, policy="fcfs")


def run(
    path: Path, pool_bytes: int, balloon_bytes: int, limits: SchedulerConfig = TURNS
) -> tuple[Engine, Mapping[str, tuple[int, ...]]]:
    """An engine that has answered all requests, and what it said."""
    deltas = Collected()
    memory = MemoryConfig(
        pool_bytes=pool_bytes,
        chunk_bytes=CHUNK_BYTES,
        balloon_bytes=balloon_bytes,
        balloon_slab_bytes=max(1, balloon_bytes),
        enable_prefix_caching=limits is TURNS,  # who finds a beginning waits for room beside it
    )
    config = EngineConfig(
        ModelSource("demo", str(path), dtype="float32"),
        memory,
        limits,
        SloConfig(ttft_ms=100, tpot_ms=10),  # of the fake clock, which a step moves by a few ms
        max_model_len=256,
    )
    engine = build_engine(config, deltas.take, FakeClock())
    wait_for_balloon(engine, balloon_bytes)
    for request in requests():
        engine.submit(request)
    while engine.step():
        pass
    engine._pool.check()
    assert all(deltas[request.request_id].finish_reason == "length" for request in requests())
    return engine, {name: delta.token_ids for name, delta in deltas.items()}


def wait_for_balloon(engine: Engine, balloon_bytes: int) -> None:
    give_up = time.monotonic() + 20
    while engine.snapshot.memory.balloon_physical * CHUNK_BYTES < balloon_bytes:
        assert time.monotonic() < give_up
        engine.step()
        time.sleep(0.001)


@pytest.mark.usefixtures("one_thread")
def test_tokens_do_not_depend_on_who_was_parked(demo_model_path: Path) -> None:
    roomy, wanted = run(demo_model_path, 160 * MIB, 0)
    assert roomy.snapshot.num_parkings == roomy.snapshot.num_preemptions == 0
    del roomy  # its weights are half a gigabyte
    tight, said = run(demo_model_path, 32 * MIB, 128 * MIB)
    assert tight.snapshot.num_parkings >= 10
    assert tight.snapshot.memory.copied_in_bytes > 0
    assert {len(tokens) for tokens in wanted.values()} == {NUM_TOKENS}
    for name, tokens in wanted.items():
        assert said[name] == tokens, name


@pytest.mark.usefixtures("one_thread")
def test_tokens_do_not_depend_on_whose_prompt_was_computed_layer_wise(demo_model_path: Path) -> None:
    roomy, wanted = run(demo_model_path, 160 * MIB, 0, LAYER_WISE)
    del roomy
    tight, said = run(demo_model_path, 24 * MIB, 128 * MIB, LAYER_WISE)
    assert tight._scheduler.turns.decisions["layer_wise"] >= 2
    assert said == wanted
