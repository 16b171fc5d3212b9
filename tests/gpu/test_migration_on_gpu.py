"""Requests move between two engines of one GPU, out of pinned memory into pinned memory, and say the same."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from engine.build import build_engine
from engine.config import MIB, EngineConfig, MemoryConfig, ModelSource, SchedulerConfig, SloConfig
from engine.messages import GenerateRequest, SamplingParams
from tests.fakes import Collected, FakeClock
from tests.unit.migration_cases import Side, eventually, move
from tests.unit.model_cases import save_tiny

pytestmark = pytest.mark.gpu

NUM_TOKENS = 60
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
SEEDED = SamplingParams(
    max_tokens=NUM_TOKENS, temperature=0.9, seed=7, repetition_penalty=1.2, ignore_eos=True
)
REQUESTS = [
    GenerateRequest(
        f"r{at}",
        tuple(random.Random(at).choices(range(199), k=40 + 9 * at)),
        SEEDED if at % 2 else GREEDY,
        unpaced=True,
    )
    for at in range(12)
]


def engine(folder: Path, pool_mib: int) -> Side:
    config = EngineConfig(
        ModelSource("tiny", str(folder), dtype="float32"),
        MemoryConfig(pool_bytes=pool_mib * MIB, balloon_bytes=256 * MIB, balloon_slab_bytes=256 * MIB),
        SchedulerConfig(max_num_seqs=12, max_num_batched_tokens=128, turn_tokens=4, min_retained_chunks=0),
        SloConfig(ttft_ms=100, tpot_ms=100),  # of the fake clock, which a step moves by a few ms
        device="cuda",
        max_model_len=250,
        enforce_eager=True,
    )
    said = Collected()
    side = Side(build_engine(config, said.take, FakeClock()), said)
    eventually(lambda: side.engine.step() or side.engine.snapshot.memory.balloon_physical > 0)
    return side


def test_answers_do_not_depend_on_where_they_were_given(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    alone, source, target = engine(tmp_path, 512), engine(tmp_path, 16), engine(tmp_path, 16)
    for request in REQUESTS:
        alone.engine.submit(request)
        source.engine.submit(request)
    alone.run()
    assert alone.engine.snapshot.num_parkings == 0
    moved = [move(source, target) for _ in range(3)]
    source.run()
    target.run()
    for request in REQUESTS:
        name = request.request_id
        parts = [side.deltas[name].token_ids for side in (source, target) if name in side.deltas]
        assert sum(parts, ()) == alone.deltas[name].token_ids, name
    assert len(set(moved)) == 3
    assert all(name in source.deltas and name in target.deltas for name in moved)
    assert target.engine.snapshot.num_preemptions == 0, "nothing was computed again"
