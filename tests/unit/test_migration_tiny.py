"""A real model's answer is the same whether its request moved or not, on one rank and on two."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from engine.build import build_engine
from engine.config import EngineConfig, MemoryConfig, ModelSource, SchedulerConfig, SloConfig
from engine.messages import GenerateRequest, SamplingParams
from engine.migration import Declined
from tests.fakes import Collected, FakeClock
from tests.unit.migration_cases import Side, eventually, move, offer_of
from tests.unit.model_cases import save_tiny
from tests.unit.tp_cases import ThreadGroup, followers_in_threads

NUM_TOKENS = 40
STEM = random.Random(0).choices(range(199), k=40)
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
# Penalties read what was said before, and each draw has its number: both have to travel.
SEEDED = SamplingParams(
    max_tokens=NUM_TOKENS,
    temperature=0.9,
    top_p=0.95,
    seed=7,
    repetition_penalty=1.2,
    presence_penalty=0.4,
    frequency_penalty=0.3,
    logprobs=2,
    ignore_eos=True,
)
REQUESTS = [
    GenerateRequest(
        f"r{at}",
        (*(STEM if at % 3 else ()), *random.Random(at).choices(range(199), k=9 + 5 * at)),
        SEEDED if at % 2 else GREEDY,
        unpaced=True,
    )
    for at in range(6)
]


def config(directory: Path, size: int, pool_kib: int) -> EngineConfig:
    return EngineConfig(
        ModelSource("tiny", str(directory)),
        MemoryConfig(
            pool_bytes=pool_kib * 1024,
            chunk_bytes=4096,
            balloon_bytes=2048 * 1024,
            balloon_slab_bytes=2048 * 1024,
        ),
        SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=48, turn_tokens=2, min_retained_chunks=0),
        SloConfig(ttft_ms=100, tpot_ms=100),  # of the fake clock, which a step moves by a few ms
        max_model_len=128,
        tensor_parallel_size=size,
    )


@contextmanager
def engines(directory: Path, size: int, pool_kib: int, count: int = 2) -> Iterator[list[Side]]:
    """So many of them, whose balloons are there."""
    settings = config(directory, size, pool_kib)
    with ExitStack() as stack:
        sides = []
        for _ in range(count):
            place = stack.enter_context(followers_in_threads(settings)) if size > 1 else None
            said = Collected()
            engine = build_engine(settings, said.take, FakeClock(), place, ThreadGroup)  # type: ignore[arg-type]
            side = Side(engine, said)
            stack.callback(side.pool._vm.close)
            eventually(lambda engine=engine: engine.step() or engine.snapshot.memory.balloon_physical > 0)  # type: ignore[misc]
            sides.append(side)
        yield sides


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny("llama", directory)
    return directory


@pytest.fixture(scope="module")
def wanted(tiny: Path) -> dict[str, tuple[object, ...]]:
    """Tokens and log probabilities of an engine with memory for all."""
    with engines(tiny, 1, 4096, count=1) as (side,):
        for request in REQUESTS:
            side.engine.submit(request)
        side.run()
        assert side.engine.snapshot.num_parkings == 0
        return {name: delta.token_ids for name, delta in side.deltas.items()}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("size", "pool_kib"), [(1, 140), (2, 84)])
def test_answers_do_not_depend_on_where_they_were_given(
    size: int, pool_kib: int, tiny: Path, wanted: dict[str, tuple[object, ...]]
) -> None:
    with engines(tiny, size, pool_kib) as (source, target):
        for request in REQUESTS:
            source.engine.submit(request)
        moved = [move(source, target) for _ in range(3)]
        before = {name: source.deltas[name].token_ids for name in moved}
        source.run()
        target.run()
        for name, tokens in wanted.items():
            parts = [side.deltas[name].token_ids for side in (source, target) if name in side.deltas]
            assert sum(parts, ()) == tokens, name
        assert all(0 < len(tokens) < NUM_TOKENS for tokens in before.values())
        assert target.engine.snapshot.num_preemptions == 0, "nothing was computed again"
        assert len(set(moved)) == 3


def test_a_group_of_another_size_is_refused(tiny: Path) -> None:
    with engines(tiny, 2, 100, count=1) as (other,), engines(tiny, 1, 160, count=1) as (source,):
        for request in REQUESTS:
            source.engine.submit(request)
        offer = offer_of(source)
        answer = other.engine.migrations.prepare(offer)
        assert answer == Declined("refused", "num_ranks is 1 there and 2 here")
        source.engine.migrations.stay(offer.migration_id)
