"""The host's side of sampling: uniform numbers, records, and which rows share a kernel."""

from __future__ import annotations

import numpy as np
import pytest

from engine.messages import SamplingParams
from engine.model.sampling_seats import RECORD, SeatTable, uniforms
from kernels import sampling_record
from kernels.sampling_record import BAN_FLAG, RECORD_WORDS, Filters
from tests.unit.sampling_cases import EOS, uniform


def numbers(seeds: list[int], counts: list[int]) -> np.ndarray:
    """The uniform numbers that the records of sequences with these seeds hold."""
    table = SeatTable(len(seeds), 10, (EOS,))
    for seat, seed in enumerate(seeds):
        table.assign(seat, SamplingParams(), seed)
    words = table.records(np.arange(len(seeds)), np.array(counts)).words
    return words.view(np.float64)[:, sampling_record.UNIFORM]


def test_uniform_numbers_are_those_of_splitmix64() -> None:
    seeds = [0, 1, -1, 42, 2**62, -(2**63), 2**63 - 1]
    counts = [0, 1, 2, 1000, 131_072, 5, 0]
    assert numbers(seeds, counts).tolist() == [uniform(*pair) for pair in zip(seeds, counts, strict=True)]
    assert uniform(-1, 3) == uniform(2**64 - 1, 3) != uniform(1, 3)


def test_uniform_numbers_are_even_and_unrelated() -> None:
    by_seed = numbers(list(range(-5000, 5000)), [0] * 10_000)
    by_count = uniforms(np.full(10_000, 12345, np.uint64), np.arange(10_000))
    for found in (by_seed, by_count):
        assert 0.0 < found.min() < 0.001 < 0.999 < found.max() < 1.0
        assert abs(found.mean() - 0.5) < 0.01
        assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.03
    pairs = [(seed, count) for seed in range(100) for count in range(100)]
    assert len(set(numbers([seed for seed, _ in pairs], [count for _, count in pairs]))) == 10_000


@pytest.mark.parametrize("name", [name for name in RECORD.names or () if name not in ("uniform", "top_p")])
def test_records_lie_as_the_kernels_read_them(name: str) -> None:
    assert RECORD.itemsize == 4 * RECORD_WORDS
    assert RECORD.fields is not None
    assert RECORD.fields[name][1] == 4 * getattr(sampling_record, name.upper())
    assert RECORD.fields["uniform"][1] == 8 * sampling_record.UNIFORM
    assert RECORD.fields["top_p"][1] == 8 * sampling_record.TOP_P


def test_rows_that_share_a_kernel_lie_together() -> None:
    table = SeatTable(6, 100, (EOS,))
    settings = [
        SamplingParams(presence_penalty=1.0, top_k=4),
        SamplingParams(top_p=0.5),
        SamplingParams(temperature=0.0, top_p=0.5),
        SamplingParams(min_tokens=2, max_tokens=4),
        SamplingParams(min_p=0.5, top_k=100),
        SamplingParams(),
    ]
    for seat, params in enumerate(settings):
        table.assign(seat, params, seat)
    seats = np.array([5, 4, 3, 2, 1, 0])
    records = table.records(seats, np.full(6, 1))
    words = records.words
    assert words[:, sampling_record.SEAT].tolist() == [5, 2, 4, 1, 3, 0]
    assert words[:, sampling_record.TARGET].tolist() == [0, 3, 1, 4, 2, 5]
    assert words[:, sampling_record.SOURCE].tolist() == [0, 3, 1, 4, 0, 1]
    assert records.num_raw == 4
    assert records.raw == Filters(2, has_top_k=False, has_top_p=True)
    assert records.adjusted == Filters(1, has_top_k=True, has_top_p=False)
    later = table.records(seats, np.full(6, 2))
    assert later.num_raw == 5
    assert later.words[:, sampling_record.SEAT].tolist() == [5, 3, 2, 4, 1, 0]


def test_edits_name_each_token_once() -> None:
    table = SeatTable(1, 100, (EOS,))
    params = SamplingParams(
        max_tokens=4,
        min_tokens=2,
        stop_token_ids=(5, 500),
        logit_bias=((7, 1.5), (5, 2.0), (7, 0.25), (200, 1.0)),
    )
    edits = table.assign(0, params, 0)
    amounts = edits[:, 1].copy().view(np.float32).tolist()
    found = dict(zip(edits[:, 0].tolist(), amounts, strict=True))
    assert found == {7: 1.75, 5 | BAN_FLAG: 2.0, EOS | BAN_FLAG: 0.0}
    assert table.assign(0, SamplingParams(), 0).size == 0


def test_min_tokens_without_a_token_to_ban_asks_for_nothing() -> None:
    table = SeatTable(1, 100, (EOS,))
    table.assign(0, SamplingParams(max_tokens=4, min_tokens=3, ignore_eos=True), 0)
    assert table.records(np.zeros(1, np.int64), np.zeros(1, np.int64)).num_raw == 1
