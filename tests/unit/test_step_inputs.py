"""Plans as index tensors: every piece in its place, padding on the guard row."""

from __future__ import annotations

import pytest
import torch

from engine.messages import PENDING_TOKEN, Piece, StepPlan
from engine.model.graphs import MAX_PIECES, GraphShape, GraphShapes, decode_sizes, graph_shapes
from engine.model.inputs import StepInputs
from kernels import reference


class Slots:
    def first_row(self, slot: int) -> int:
        return 1 + 10 * slot


def make(max_tokens: int = 64, max_sequences: int = 8) -> StepInputs:
    return StepInputs(torch.device("cpu"), Slots(), max_tokens, max_sequences, reference)


def one(slot: int, start: int, token: int, samples: bool = True) -> Piece:
    return Piece(f"r{slot}", slot, slot + 4, start, (token,), samples)


MIXED = StepPlan(
    1,
    (
        one(3, 7, PENDING_TOKEN),
        one(0, 4, 11),
        Piece("r1", 1, 6, 2, (21, 22, 23), samples=False),
        Piece("r2", 2, 7, 10, (31, 32), samples=True, shared_slot=5, shared_tokens=8),
    ),
    num_decodes=2,
)


def test_decodes_come_before_pieces_of_prompts() -> None:
    batch = make().put(MIXED)
    assert batch.num_decodes == 2
    assert batch.input_ids[1:].tolist() == [11, 21, 22, 23, 31, 32]
    assert batch.is_pending.tolist() == [True, False]
    assert batch.pending_seats[0] == 7
    assert batch.positions.tolist() == [7, 4, 2, 3, 4, 10, 11]
    assert batch.token_first_rows.tolist() == [31, 1, 11, 11, 11, 21, 21]
    assert batch.decode_first_rows.tolist() == [31, 1]
    assert batch.decode_context_lens.tolist() == [8, 5]
    assert batch.query_starts.tolist() == [0, 3, 5]
    assert batch.prefill_first_rows.tolist() == [11, 21]
    assert batch.prefill_context_lens.tolist() == [5, 12]
    assert batch.prefill_shared_first_rows.tolist()[1] == 51
    assert batch.prefill_shared_lens.tolist() == [0, 8]
    assert batch.decode_shared_lens.tolist() == [0, 0]
    assert batch.max_query_len == 3
    assert batch.sample_indices is not None
    assert batch.sample_indices.tolist() == [0, 1, 6]
    assert batch.decode_context_lens.dtype == batch.query_starts.dtype == torch.int32
    assert batch.positions.dtype == batch.input_ids.dtype == torch.int64


def test_a_step_that_samples_every_token_needs_no_indices() -> None:
    assert make().put(StepPlan(1, (one(0, 1, 5), one(1, 1, 6)), 2)).sample_indices is None
    partly = make().put(StepPlan(1, (one(0, 1, 5), one(1, 1, 6, samples=False)), 2))
    assert partly.sample_indices is not None
    assert partly.sample_indices.tolist() == [0]


def test_padding_points_at_the_guard_row() -> None:
    inputs = make()
    inputs.put(MIXED)  # leaves other values where the padding goes
    batch = inputs.put(StepPlan(1, (one(3, 7, PENDING_TOKEN), one(0, 4, 11)), 2), GraphShape(4))
    assert batch.num_decodes == 4
    assert batch.decode_first_rows.tolist() == [31, 1, 0, 0]
    assert batch.token_first_rows.tolist() == [31, 1, 0, 0]
    assert batch.positions.tolist() == [7, 4, 0, 0]
    assert batch.decode_context_lens.tolist() == [8, 5, 1, 1]
    assert batch.is_pending.tolist() == [True, False, False, False]
    assert batch.input_ids[1:].tolist() == [11, 0, 0]
    assert batch.sample_indices is None


def test_steps_of_a_size_have_their_tensors_at_the_same_addresses() -> None:
    inputs = make()
    first = inputs.put(StepPlan(1, (one(0, 4, 11),), 1), GraphShape(4))
    inputs.put(MIXED)
    second = inputs.put(StepPlan(1, (one(0, 5, 12), one(1, 5, 12), one(2, 5, 12)), 3), GraphShape(4))
    for name in ("input_ids", "positions", "decode_first_rows", "decode_context_lens", "is_pending"):
        assert getattr(first, name).data_ptr() == getattr(second, name).data_ptr()


def test_prompts_stay_behind_the_places_for_decodes() -> None:
    batch = make().put(MIXED, GraphShape(4, 8, 3))
    assert batch.num_decodes == 4
    assert batch.input_ids[1:].tolist() == [11, 0, 0, 21, 22, 23, 31, 32, 0, 0, 0]
    assert batch.positions.tolist() == [7, 4, 0, 0, 2, 3, 4, 10, 11, 0, 0, 0]
    assert batch.token_first_rows.tolist() == [31, 1, 0, 0, 11, 11, 11, 21, 21, 0, 0, 0]
    assert batch.decode_first_rows.tolist() == [31, 1, 0, 0]
    assert batch.decode_context_lens.tolist() == [8, 5, 1, 1]
    assert batch.query_starts.tolist() == [0, 3, 5, 5]
    assert batch.prefill_first_rows.tolist() == [11, 21, 0]
    assert batch.prefill_context_lens.tolist() == [5, 12, 1]
    assert batch.prefill_shared_lens.tolist() == [0, 8, 0]
    assert batch.decode_shared_lens.tolist() == [0, 0, 0, 0]
    assert batch.max_query_len == 8
    assert batch.sample_indices is not None
    assert batch.sample_indices.tolist() == [0, 1, 8, 0, 0, 0, 0]


def test_rows_that_a_full_step_does_not_sample_are_filled_up_too() -> None:
    """Decodes, pieces and tokens of the shape exactly, but one piece's prompt goes on: a row is left over."""
    inputs = make()
    for stage in inputs._stages:
        stage.fill_(0x7F)  # what another step's layout left there
    batch = inputs.put(MIXED, GraphShape(2, 5, 2))
    assert batch.sample_indices is not None
    assert batch.sample_indices.tolist() == [0, 1, 6, 0]


def test_the_largest_step_fits() -> None:
    inputs = make(max_tokens=64, max_sequences=8)
    inputs.put(StepPlan(1, tuple(one(slot, 0, 1) for slot in range(8)), 8))
    pieces = tuple(Piece(f"r{slot}", slot, slot, 0, (1,) * 8, samples=True) for slot in range(8))
    batch = inputs.put(StepPlan(1, pieces, 0))
    assert batch.query_starts.tolist() == list(range(0, 65, 8))
    for shape in graph_shapes(8, 64, 8e9):
        inputs.put(StepPlan(0, (), 0), shape)


@pytest.mark.parametrize("max_sequences", [1, 2, 3, 8, 40])
def test_the_largest_graphs_fit(max_sequences: int) -> None:
    """A graph has places for 16 pieces of prompts, however few sequences there may be."""
    for max_tokens in (max_sequences, max_sequences + 32, max_sequences + 64):
        inputs = make(max_tokens, max_sequences)
        for shape in graph_shapes(max_sequences, max_tokens, 8e9):
            batch = inputs.put(StepPlan(0, (), 0), shape)
            assert batch.query_starts.shape == (shape.pieces + 1,)
            assert batch.sample_indices is None or batch.sample_indices.shape == (shape.rows,)


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 9, 64, 250, 256, 1000])
def test_decodes_are_filled_up_little(most: int) -> None:
    sizes = decode_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    for count in range(1, most + 1):
        size = min(size for size in sizes if size >= count)
        assert size - count < max(min(8, count), count / 16 + 1)


def _plan(decodes: int, *prompts: int, samples: bool = True) -> StepPlan:
    pieces = [one(slot, 9, 1, samples) for slot in range(decodes)]
    pieces += [Piece(f"p{index}", 99, 9, 0, (1,) * count, True) for index, count in enumerate(prompts)]
    return StepPlan(1, tuple(pieces), decodes)


@pytest.mark.parametrize(
    ("plan", "shape"),
    [
        (_plan(1), GraphShape(1)),
        (_plan(3), GraphShape(4)),
        (_plan(65), GraphShape(72)),
        (_plan(256), GraphShape(256)),
        (_plan(3, samples=False), None),
        (_plan(0, 5), GraphShape(0, 32, MAX_PIECES)),
        (_plan(0, 32), GraphShape(0, 32, MAX_PIECES)),
        (_plan(40, 20, 13), GraphShape(64, 64, MAX_PIECES)),
        (_plan(256, 512), GraphShape(256, 512, MAX_PIECES)),
        (_plan(7, 513), None),
        (_plan(7, *[2] * (MAX_PIECES + 1)), None),
    ],
)
def test_the_smallest_graph_that_holds_a_step(plan: StepPlan, shape: GraphShape | None) -> None:
    assert GraphShapes(graph_shapes(256, 8192, 8.03e9)).fitting(plan) == shape


def test_graphs_stay_few() -> None:
    assert len(graph_shapes(256, 8192, 8.03e9)) == 90
    assert len(graph_shapes(1024, 8192, 8e9)) < 180


def test_a_small_model_has_graphs_for_longer_prompts() -> None:
    longest = {
        weights: max(shape.prompt_tokens for shape in graph_shapes(64, 8192, weights))
        for weights in (70e9, 8e9, 4e9, 0.6e9, 0.1e9)
    }
    assert longest == {70e9: 64, 8e9: 512, 4e9: 1024, 0.6e9: 4096, 0.1e9: 4096}


def test_no_graph_is_larger_than_a_step_may_be() -> None:
    shapes = graph_shapes(8, 64, 8e9)
    assert max(shape.tokens for shape in shapes) <= 64
    assert shapes[0].tokens == max(shape.tokens for shape in shapes), "the largest is captured first"
    assert GraphShapes(()).fitting(_plan(1)) is None
