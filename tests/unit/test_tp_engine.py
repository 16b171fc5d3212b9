"""A TP group as an engine: the tokens of one rank, in tight memory too, and an end that everybody hears of.

Ranks are threads here, each with its own driver, its own memory and its own share of the weights;
`tests/serving` has them in processes.
"""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from engine.build import build_engine
from engine.config import EngineConfig, MemoryConfig, ModelSource, SchedulerConfig
from engine.control import Order
from engine.core import Engine
from engine.errors import EngineDeadError, ModelLoadError
from engine.messages import GenerateRequest, SamplingParams
from engine.tp.follower import follow
from engine.tp.place import RankPlace
from engine.tp.wire import accept, connect, pack
from tests.fakes import Collected
from tests.unit.model_cases import save_tiny
from tests.unit.tp_cases import ThreadGroup, followers_in_threads, places, run

NUM_TOKENS = 30
PROMPTS = [tuple(random.Random(seed).choices(range(199), k=9 + 7 * seed)) for seed in range(6)]
SAMPLING = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)


def config(
    directory: Path, size: int, pool_kib: int = 4096, balloon_kib: int = 0, **limits: object
) -> EngineConfig:
    return EngineConfig(
        ModelSource("tiny", str(directory)),
        MemoryConfig(
            pool_bytes=pool_kib * 1024,
            chunk_bytes=4096,
            balloon_bytes=balloon_kib * 1024,
            balloon_slab_bytes=64 * 1024,
        ),
        SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=48, **limits),  # type: ignore[arg-type]
        max_model_len=96,
        tensor_parallel_size=size,
    )


@contextmanager
def engine_of(config: EngineConfig, said: Collected) -> Iterator[Engine]:
    """An engine of several ranks, none of which outlives the block."""
    with followers_in_threads(config) as place:
        engine = build_engine(config, said.take, place=place, group_class=ThreadGroup)
        yield engine
        engine._pool._vm.close()  # what dropping the engine does, now


def serve(engine: Engine, said: Collected, prompts: list[tuple[int, ...]] = PROMPTS) -> list[tuple[int, ...]]:
    for index, prompt in enumerate(prompts):
        engine.submit(GenerateRequest(f"{len(said)}-{index}", prompt, SAMPLING))
    first = len(said)
    while engine.step():
        pass
    assert all(said[f"{first}-{index}"].error is None for index in range(len(prompts)))
    return [said[f"{first}-{index}"].token_ids for index in range(len(prompts))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny("llama", directory)
    return directory


@pytest.fixture(scope="module")
def wanted(tiny: Path) -> list[tuple[int, ...]]:
    """The tokens of one rank."""
    said = Collected()
    return serve(build_engine(config(tiny, 1), said.take), said)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_tokens_are_those_of_one_rank(size: int, tiny: Path, wanted: list[tuple[int, ...]]) -> None:
    said = Collected()
    with engine_of(config(tiny, size), said) as engine:
        assert serve(engine, said) == wanted
        assert serve(engine, said) == wanted  # from cached prefixes, partly copied
        assert engine.snapshot.prefix_hits > 0


@pytest.mark.parametrize(("policy", "decision"), [("slo", "park_for_prompt"), ("fcfs", "layer_wise")])
def test_sequences_take_turns_on_all_ranks(
    policy: str, decision: str, tiny: Path, wanted: list[tuple[int, ...]]
) -> None:
    """KV moves between each rank's device and its own part of the balloon, whole or layer by layer."""
    said = Collected()
    settings = config(tiny, 2, pool_kib=84, balloon_kib=2048, policy=policy, min_retained_chunks=0)
    with engine_of(settings, said) as engine:
        assert serve(engine, said) == wanted
        snapshot = engine.snapshot
    assert dict(snapshot.decisions).get(decision, 0) > 0
    assert snapshot.memory.copied_in_bytes > 0


def test_memory_given_back_is_given_back_by_all_ranks(tiny: Path, wanted: list[tuple[int, ...]]) -> None:
    said = Collected()
    with engine_of(config(tiny, 2), said) as engine:
        assert serve(engine, said) == wanted
        freed = engine.trim(drop_cache=True)
        engine.step()
        assert freed.result() > 0
        assert serve(engine, said) == wanted


def test_a_rank_that_cannot_load_says_why(tiny: Path) -> None:
    """Its error is the engine's, at once, and not a silence."""
    settings = config(tiny, 2)
    first, second = places(2)

    def fail() -> None:
        broken = replace(settings, model=ModelSource("tiny", "/nowhere/at/all"))
        with pytest.raises(ModelLoadError):
            follow(broken, second, ThreadGroup)

    thread = run(fail)
    with pytest.raises(ModelLoadError, match="/nowhere/at/all"):
        build_engine(settings, Collected().take, place=first, group_class=ThreadGroup)
    thread.join(10)


def test_an_engine_whose_rank_is_gone_ends(tiny: Path) -> None:
    """The loop ends with the cause, and open requests are told."""
    said = Collected()
    with followers_in_threads(config(tiny, 2)) as place:
        engine = build_engine(config(tiny, 2), said.take, place=place, group_class=ThreadGroup)
        engine.submit(GenerateRequest("a", PROMPTS[0], SAMPLING))
        engine._runner._followers.close()  # type: ignore[attr-defined] # as if its process had been killed
        engine.run_until(threading.Event())
    with pytest.raises(EngineDeadError, match="is gone"):
        engine.check_alive()
    assert said["a"].finish_reason == "error"


def test_ranks_that_never_come(tmp_path: Path) -> None:
    place = RankPlace(0, 3, str(tmp_path))
    thread = run(lambda: connect(RankPlace(1, 3, str(tmp_path)), "plan").send(pack(())))
    with pytest.raises(EngineDeadError, match=r"ranks \[2\] did not start within"):
        accept(place, ["plan"], timeout_s=0.5)
    thread.join(10)


def test_ranks_meet_however_long_the_path_is(tmp_path: Path) -> None:
    """The kernel takes 107 bytes for the name of a socket; the TMPDIR of some batch systems is longer."""
    directory = tmp_path / ("t" * 120)
    directory.mkdir()
    thread = run(lambda: connect(RankPlace(1, 2, str(directory)), "plan").send(pack(("here",))))
    links = accept(RankPlace(0, 2, str(directory)), ["plan"], timeout_s=30)
    assert links["plan"][0].receive(timeout_s=30) == ("here",)
    thread.join(10)


def test_the_group_is_gone_with_its_engine(tiny: Path) -> None:
    """Nothing has to be closed: whoever drops an engine ends its ranks."""
    with followers_in_threads(config(tiny, 2)) as place:
        engine = build_engine(config(tiny, 2), Collected().take, place=place, group_class=ThreadGroup)
        engine.step()
        del engine
        gc.collect()


def test_all_ranks_follow_a_limit(tmp_path: Path) -> None:
    """Every chunk is made and given back on each of them: one limit holds for all, tokens stay the same."""
    save_tiny("llama", tmp_path)
    said = Collected()
    with engine_of(config(tmp_path, 2), said) as engine:
        expected = serve(engine, said)
        for revision, chunks in enumerate((40, 400, 60)):
            answer = engine.apply(Order(1, revision, 0, 0, pool_bytes=chunks * 4096))
            engine.step()
            assert answer.result(timeout=60).outcome in ("applied", "deferred")
            assert serve(engine, said) == expected
            memory = engine.snapshot.memory
            assert memory.created <= memory.limit == chunks
        assert engine._pool._vm._followers.ask("release", b"") == [0]  # type: ignore[attr-defined]  # they answer
