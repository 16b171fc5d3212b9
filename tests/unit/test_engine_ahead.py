"""The way a GPU's engine works, on a CPU: a step ahead of its tokens, and filled up to fixed sizes.

What a CUDA graph would replay is run anew at each replay, over the same views: so the sizes, the padding and
the tokens in flight are the GPU's, and only the kernels are the reference's.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.build import build_engine
from engine.core import Engine
from engine.messages import GenerateRequest, SamplingParams
from engine.model.graphs import GraphShape, graph_shapes
from tests.fakes import Collected
from tests.unit.model_cases import save_tiny
from tests.unit.test_engine_families import PROMPTS, config

NUM_TOKENS = 30
ASKS: tuple[dict[str, object], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.9, "seed": 1},
    {"temperature": 1.0, "seed": 2, "top_k": 20, "top_p": 0.9},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"temperature": 0.8, "seed": 3, "presence_penalty": 0.7, "min_tokens": 12, "logprobs": 2},
    {"temperature": 0.0, "logit_bias": ((3, 4.0),), "logprobs": 0},
)


class Ahead:
    """An engine a step ahead. `used` counts the replays of each shape, where there are any."""

    def __init__(self, directory: Path, pool_kib: int, piece: int | None, is_padded: bool) -> None:
        self.said = Collected()
        self.engine: Engine = build_engine(config(directory, pool_kib, piece), self.said.take)
        self.engine._steps_ahead = 1
        self.used: dict[GraphShape, int] = {}
        if is_padded:
            self._record_all()

    def _record_all(self) -> None:
        pool, runner = self.engine._pool, self.engine._runner
        shapes = [shape for shape in graph_shapes(6, 48, 8e9) if pool.fits_step(shape.tokens, shape.rows)]
        for shape in shapes:
            assert pool.reserve([], shape.tokens, shape.rows)
        todo = iter(shapes)

        def record(work):  # type: ignore[no-untyped-def]
            shape = next(todo)

            def replay() -> None:
                self.used[shape] = self.used.get(shape, 0) + 1
                work()

            return replay

        runner.capture(shapes, record)  # type: ignore[attr-defined]

    def run(self) -> None:
        while self.engine.step():
            pass


def submit(engine: Engine, index: int) -> None:
    sampling = SamplingParams(max_tokens=NUM_TOKENS + index, ignore_eos=True, **ASKS[index])  # type: ignore[arg-type]
    engine.submit(GenerateRequest(str(index), PROMPTS[index], sampling))


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp(request.param)
    save_tiny(request.param, directory)
    return directory


@pytest.fixture(scope="module")
def alone(tiny: Path) -> Collected:
    """What each request is answered by itself, every token read before the next step."""
    said = Collected()
    engine = build_engine(config(tiny, 4096, None), said.take)
    for index in range(len(ASKS)):
        submit(engine, index)
        while engine.step():
            pass
    return said


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize(("pool_kib", "piece"), [(4096, None), (4096, 7), (4096, 1), (160, 16)])
def test_the_same_tokens_as_alone(
    tiny: Path, alone: Collected, pool_kib: int, piece: int | None, is_padded: bool
) -> None:
    ahead = Ahead(tiny, pool_kib, piece, is_padded)
    for index in range(len(ASKS)):
        submit(ahead.engine, index)
        for _ in range(3):  # the batch grows, is mixed with prompts, shrinks
            ahead.engine.step()
    ahead.run()
    for index in range(len(ASKS)):
        found, wanted = ahead.said[str(index)], alone[str(index)]
        assert found.token_ids == wanted.token_ids, index
        assert len(found.logprobs) == len(wanted.logprobs)
        for ours, theirs in zip(found.logprobs, wanted.logprobs, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert dict(ours.top) == pytest.approx(dict(theirs.top), abs=1e-4)
    memory = ahead.engine.snapshot.memory
    assert memory.free + memory.cached + memory.activation + memory.guard == memory.total
    if is_padded and pool_kib == 4096 and piece != 1:
        assert any(shape.pieces for shape in ahead.used), "prompts beside decodes were filled up"
        assert any(not shape.pieces for shape in ahead.used), "decodes were filled up"


def test_a_pool_that_preempts_is_one_of_the_cases(tiny: Path) -> None:
    ahead = Ahead(tiny, 160, 16, is_padded=True)
    for index in range(len(ASKS)):
        submit(ahead.engine, index)
    ahead.run()
    assert ahead.engine.snapshot.num_preemptions > 0
