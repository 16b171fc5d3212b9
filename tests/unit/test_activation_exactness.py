"""`activation_bytes` is exact: what a step of the real decoder touches is what was planned, no byte more.

A step runs twice: in the arena, filled with a pattern that must still be there beyond the planned bytes,
and in buffers that lie apart, each with the pattern behind it, where the last line of each must have
changed. A plan too small would be somebody else's memory; one too large, memory that sequences could have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig, ModelSource
from engine.memory.arena import ActivationArena, BufferSpec, activation_bytes
from engine.memory.chunks import ChunkPool
from engine.memory.host_vmm import HostVirtualMemory
from engine.messages import StepPlan
from engine.model.buffers import activation_specs
from engine.model.graphs import GraphShape
from engine.model.loader import LoadedModel, load_model
from engine.model.runner import Buffers, ModelRunner
from tests.unit.model_cases import ScrambledKv, piece, plan, save_tiny

CHUNK = 4096
MAX_TOKENS, MAX_ROWS = 48, 24
CANARY = 0xA5
ALIGN = 256
PADDING = 9  # a slot over row 0, which padding reads and writes
FAMILIES = ("llama-biases", "mistral", "qwen3")  # biases, neither, norms over heads
TEXT = [(7 * at) % 191 for at in range(64)]

CASES = {
    "decodes": plan(*(piece(slot, TEXT, 40, 41) for slot in range(4))),
    "one decode": plan(piece(2, TEXT, 40, 41)),
    "a prompt": plan(piece(0, TEXT, 0, 33)),
    "prompts": plan(piece(0, TEXT, 0, 23), piece(1, TEXT, 0, 17)),
    "a piece that samples nothing": plan(piece(0, TEXT, 0, 33, samples=False)),
    "a piece that goes on": plan(piece(3, TEXT, 40, 59)),
    "decodes beside prompts": plan(
        piece(0, TEXT, 40, 41), piece(2, TEXT, 40, 41), piece(1, TEXT, 0, 19), piece(3, TEXT, 40, 43)
    ),
}
SHAPES = (GraphShape(8), GraphShape(4, 32, 16))
PADDED = {"decodes": SHAPES[0], "one decode": SHAPES[0], "decodes beside prompts": SHAPES[1]}


class Apart:
    """Buffers that do not share memory, each with a line of canaries behind it."""

    def __init__(self, specs: tuple[BufferSpec, ...]) -> None:
        self._specs = specs
        self._bytes: dict[tuple[str, int, int], torch.Tensor] = {}
        self._made: dict[tuple[int, int], dict[str, torch.Tensor]] = {}

    def is_backed(self, num_tokens: int, num_rows: int) -> bool:
        return True

    def buffers(self, num_tokens: int, num_rows: int) -> dict[str, torch.Tensor]:
        size = (num_tokens, num_rows)
        if size not in self._made:
            self._made[size] = self._make(*size)
        return self._made[size]

    def _make(self, num_tokens: int, num_rows: int) -> dict[str, torch.Tensor]:
        made = {}
        for spec in self._specs:
            count = spec.count(num_tokens, num_rows)
            nbytes = count * spec.width * spec.dtype.itemsize
            whole = torch.full((nbytes + ALIGN,), CANARY, dtype=torch.uint8)
            self._bytes[spec.name, num_tokens, num_rows] = whole
            made[spec.name] = whole[:nbytes].view(spec.dtype).view(count, spec.width)
        return made

    @torch.inference_mode()  # some were made in it
    def fill(self) -> None:
        for whole in self._bytes.values():
            whole.fill_(CANARY)

    def overrun(self) -> list[str]:
        """Buffers that were written beyond their end."""
        return [name for (name, _, _), whole in self._bytes.items() if bool((whole[-ALIGN:] != CANARY).any())]

    def too_long(self, num_tokens: int, num_rows: int) -> list[str]:
        """Buffers whose last line, or last element of it, was not written."""
        long = []
        for spec in self._specs:
            count = spec.count(num_tokens, num_rows)
            line = self._bytes[spec.name, num_tokens, num_rows][:-ALIGN].view(spec.dtype)
            pattern = torch.full((spec.dtype.itemsize,), CANARY, dtype=torch.uint8).view(spec.dtype)
            if count and spec.width and (line[-1] == pattern or line[-spec.width] == pattern):
                long.append(spec.name)
        return long


class Model:
    """A tiny model with an arena that is twice as large as its largest step.

    Attributes:
        bytes: the arena's, all of them backed.
    """

    def __init__(self, model: LoadedModel) -> None:
        facts = model.facts
        self._model = model
        self.specs = activation_specs(facts.shard, facts.dtype, facts.kernels)
        total = 2 + activation_bytes(self.specs, 2 * MAX_TOKENS, 2 * MAX_ROWS) // CHUNK
        self.chunks = ChunkPool(HostVirtualMemory(CHUNK, total), total)
        self.arena = ActivationArena(self.chunks, self.specs, 2 * MAX_TOKENS, 2 * MAX_ROWS)
        self.back(self.arena.max_chunks)
        self.bytes = self.arena.tensor.view(torch.uint8)

    def back(self, num_chunks: int) -> None:
        rows = self.arena.missing_rows(num_chunks)
        for row in rows:
            if self.arena.tensor.can_adopt(row):
                self.arena.tensor.adopt(row)
        empty = [row for row in rows if self.arena.tensor.is_empty(row)]
        taken = self.chunks.take(len(empty), "activation")
        assert taken is not None
        self.arena.tensor.map(empty, taken)

    def runner(self, buffers: Buffers, is_padded: bool) -> ModelRunner:
        """Computes in these buffers, steps filled up to `SHAPES` or as they are."""
        facts = self._model.facts
        kv = ScrambledKv(facts.config, (PADDING, 2, 0, 3, 1), slot_tokens=64, tokens_per_row=8)
        for view in kv.layer_views:
            view.fill_(0.5)
        seats = torch.zeros(MAX_ROWS, dtype=torch.int64)
        runner = ModelRunner(self._model.decoder, buffers, kv, facts.device, seats, MAX_TOKENS, MAX_ROWS)
        if is_padded:
            runner.capture(SHAPES, lambda work: _now_and_again(work))
        return runner


def _now_and_again(work: Callable[[], object]) -> Callable[[], object]:
    work()
    return work


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # beside a busy process two take 50 times as long for matrices this small
    folder: Path = tmp_path_factory.mktemp("model")
    save_tiny(request.param, folder)
    yield Model(load_model(EngineConfig(ModelSource("tiny", str(folder)), max_model_len=128)))
    torch.set_num_threads(threads)


def _size(step: StepPlan, shape: GraphShape | None) -> tuple[int, int]:
    return (step.num_tokens, step.num_rows) if shape is None else (shape.tokens, shape.rows)


STEPS = [(name, None) for name in CASES] + list(PADDED.items())


@pytest.mark.parametrize(("name", "shape"), STEPS)
def test_a_step_touches_what_was_planned(model: Model, name: str, shape: GraphShape | None) -> None:
    step, size = CASES[name], _size(CASES[name], shape)
    planned = activation_bytes(model.specs, *size)
    runner = model.runner(model.arena, is_padded=shape is not None)
    model.bytes.fill_(CANARY)
    logits = runner.run(step)
    touched = (model.bytes != CANARY).nonzero().flatten()
    assert int(touched[-1]) < planned, "bytes that are not the step's"
    apart = Apart(model.specs)
    runner = model.runner(apart, is_padded=shape is not None)
    apart.fill()
    expected = runner.run(step)
    assert torch.equal(logits[: step.num_rows], expected[: step.num_rows]), "buffers in use share memory"
    assert apart.overrun() == []
    too_long = set(apart.too_long(*size))
    # Where every token samples there is nothing to gather; and kernels may leave rows of padding out.
    assert too_long - ({"attention"} if shape else set()) == (
        {"sampled_hidden"} if size[0] == size[1] else set()
    )
    if "attention" not in too_long:
        ends = torch.tensor([-1]), touched, torch.tensor([planned])
        assert int(torch.cat(ends).diff().max()) <= ALIGN, "bytes that no step of that size uses"


def test_buffers_that_are_in_use_at_once_lie_apart_and_stages_over_one_another(model: Model) -> None:
    places = {
        name: (start, start + nbytes)
        for name, (start, nbytes) in _addresses(model.arena.buffers(33, 5)).items()
    }
    lasting = {"hidden", "residual", "workspace"}
    stages = ({"qkv", "attention"}, {"gate_up", "activated"}, {"sampled_hidden", "logits"})
    assert lasting.union(*stages) == places.keys()
    for stage in stages:
        ordered = sorted(places[name] for name in lasting | stage)
        assert all(end <= start for (_, end), (start, _) in pairwise(ordered))
    assert len({min(places[name] for name in stage)[0] for stage in stages}) == 1


def test_only_the_workspace_may_be_longer_than_what_is_written(model: Model) -> None:
    """It is as long as the most that any batch needs; here, on a CPU, that is nothing."""
    fixed = {spec.name: spec.width for spec in model.specs if spec.per == "step"}
    assert fixed == {"workspace": 0}


def test_a_size_has_the_same_addresses_after_the_arena_shrank_and_grew(model: Model) -> None:
    """CUDA graphs know addresses only."""
    sizes = [(1, 1), (33, 1), (8, 8), (MAX_TOKENS, 4)]
    before = [_addresses(model.arena.buffers(*size)) for size in sizes]
    model.arena.shrink(model.arena.chunks_for(1, 1))
    model.chunks.settle()
    stolen = model.chunks.take(model.chunks.num_free, "kv")  # others hold what it had
    assert stolen is not None
    model.chunks.put_back(stolen)
    assert not model.arena.is_backed(MAX_TOKENS, 4)
    model.back(model.arena.max_chunks)
    assert [_addresses(model.arena.buffers(*size)) for size in reversed(sizes)] == before[::-1]
    runner = model.runner(model.arena, is_padded=False)
    apart = model.runner(Apart(model.specs), is_padded=False)
    for step in CASES.values():
        assert torch.equal(runner.run(step), apart.run(step)), "and computes the same there"


def _addresses(buffers: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    return {name: (buffer.data_ptr(), buffer.nbytes) for name, buffer in buffers.items()}
