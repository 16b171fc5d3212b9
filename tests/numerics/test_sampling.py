"""Sampling on both backends against a float64 oracle that takes one row at a time.

Vocabularies are small where Triton is interpreted, and still have several parts there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from triton import knobs

from engine.messages import SamplingParams
from engine.model.sampler import Sampled, SampleRow
from engine.model.sampling_seats import SeatTable
from kernels import sampling_record
from kernels.sampling_record import PROMPT_FLAG, Filters
from tests.numerics.cases import DTYPES, Backend, strided
from tests.unit.sampling_cases import (
    EOS,
    Story,
    make_sampler,
    oracle_adjust,
    oracle_probabilities,
    oracle_tokens,
    penalized_rows,
    random_logits,
    row,
    sample,
    varied_rows,
)


def run(backend: Backend, logits: torch.Tensor, *rows: SampleRow) -> list[Sampled]:
    """One step on the backend's device."""
    return sample(logits.to(backend.device), *rows, kernels=backend.kernels)


def tokens(results: Sequence[Sampled]) -> list[int]:
    """The tokens of results, none of which is an error."""
    assert not [one.error for one in results if one.error]
    return [one.token_id for one in results]


def draw_at(
    backend: Backend, logits: torch.Tensor, params: SamplingParams, spots: Sequence[float]
) -> list[int]:
    """Tokens of one row of logits at given places of its distribution, straight from the kernels."""
    table = SeatTable(1, logits.shape[1], (EOS,))
    table.assign(0, params, 0)
    words = table.records(np.zeros(1, np.int64), np.zeros(1, np.int64))
    records = torch.from_numpy(words.words).repeat(len(spots), 1)
    records.view(torch.float64)[:, sampling_record.UNIFORM] = torch.tensor(spots, dtype=torch.float64)
    records[:, sampling_record.TARGET] = torch.arange(len(spots), dtype=torch.int32)
    records[:, sampling_record.SEAT] = torch.arange(len(spots), dtype=torch.int32)
    device, num_rows = backend.device, len(spots)
    last_tokens = torch.full((num_rows + 1,), -1, dtype=torch.int64, device=device)
    results = torch.full((num_rows, 2), -1, dtype=torch.int32, device=device)
    backend.kernels.sample(
        logits.to(device),
        records.to(device),
        Filters(num_rows if words.raw.num_rows else 0, words.raw.has_top_k, words.raw.has_top_p),
        torch.empty(0, dtype=torch.int32, device=device),
        last_tokens,
        results,
        backend.kernels.sampling_workspace(num_rows, logits.shape[1], device),
    )
    assert results[:, 0].tolist() == last_tokens[:-1].tolist()
    assert last_tokens[-1] == -1
    return results[:, 0].tolist()


def kept(backend: Backend, logits: torch.Tensor, params: SamplingParams, ids: list[int]) -> bool:
    """Whether just these tokens share the distribution: each is found in the middle of its share."""
    shares = torch.softmax(logits[0, ids].double(), 0)
    spots = (shares.cumsum(0) - shares / 2).tolist()
    return draw_at(backend, logits, params, spots) == ids


def even_spots(count: int) -> list[float]:
    """Numbers in (0, 1) at equal distances."""
    return [(index + 0.5) / count for index in range(count)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [13, 700])
def test_every_parameter(backend: Backend, vocab: int, dtype: torch.dtype) -> None:
    rows = varied_rows(vocab, seeds=1)
    logits = random_logits(len(rows), vocab, seed=vocab).to(dtype)
    assert tokens(run(backend, logits, *rows)) == oracle_tokens(logits, rows)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [49_152, 128_256, 262_144])
def test_every_parameter_over_a_real_vocabulary(backend: Backend, vocab: int, dtype: torch.dtype) -> None:
    rows = varied_rows(vocab, seeds=4)
    logits = random_logits(len(rows), vocab, seed=vocab).to(dtype)
    assert tokens(run(backend, logits, *rows)) == oracle_tokens(logits, rows)


def test_strided_rows_and_padding(backend: Backend) -> None:
    rows = varied_rows(300, seeds=1)
    logits = random_logits(len(rows), 300)
    padded = torch.cat([logits, torch.full((3, 300), torch.nan)]).to(backend.device)
    found = sample(strided(padded, extra=48), *rows, kernels=backend.kernels)
    assert tokens(found) == oracle_tokens(logits, rows)


def test_a_row_alone_and_in_a_batch(backend: Backend) -> None:
    rows = varied_rows(600, seeds=1)
    logits = random_logits(len(rows), 600, seed=5).bfloat16()
    together = tokens(run(backend, logits, *rows))
    alone = [tokens(run(backend, logits[index : index + 1], one))[0] for index, one in enumerate(rows)]
    assert together == alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.4}, {"top_k": 11}, {"top_p": 0.83}, {"min_p": 0.05}, {"top_k": 30, "top_p": 0.5}],
    ids=str,
)
def test_the_distribution_is_inverted(backend: Backend, params: dict[str, Any], dtype: torch.dtype) -> None:
    """At even spots, the token whose share of the distribution the spot is in."""
    logits, spots = (
        random_logits(1, 600, seed=3).to(dtype),
        even_spots(1000 if torch.cuda.is_available() else 10),
    )
    sums = np.cumsum(oracle_probabilities(logits[0].float().numpy(), row(**params)))
    found = draw_at(backend, logits, SamplingParams(**params), spots)
    assert found == np.searchsorted(sums, np.array(spots) * sums[-1], side="right").tolist()


@pytest.mark.parametrize("params", [{}, {"top_k": 2}, {"top_p": 0.999}, {"min_p": 0.5}], ids=str)
def test_extreme_spots_stay_inside_the_support(backend: Backend, params: dict[str, Any]) -> None:
    logits = torch.full((1, 600), -torch.inf)
    logits[0, 290] = logits[0, 310] = 1.0
    spots = [0.5 / 2**48, 0.49, 0.51, 1 - 0.5 / 2**48]
    assert draw_at(backend, logits, SamplingParams(**params), spots) == [290, 290, 310, 310]


def test_ties(backend: Backend) -> None:
    """The first of the largest; at a threshold all or none, in whatever part they lie, -0.0 as 0.0."""
    logits = torch.full((1, 600), -3.0)
    logits[0, [70, 300, 599]] = 2.0
    logits[0, [5, 301, 400]] = torch.tensor([0.0, -0.0, -0.0])
    assert tokens(run(backend, logits, row(temperature=0.0))) == [70]
    three, six = [70, 300, 599], [5, 70, 300, 301, 400, 599]
    assert kept(backend, logits, SamplingParams(top_k=2), three)
    assert kept(backend, logits, SamplingParams(top_k=4), six)
    # Of the six the three largest hold 0.88 of the mass: more is needed than they have.
    assert kept(backend, logits, SamplingParams(top_k=6, top_p=0.9), six)
    # Of four kept by rank the three largest hold 0.957: surplus ties add nothing to the target.
    assert kept(backend, logits, SamplingParams(top_k=4, top_p=0.95), three)
    flat, spots = torch.zeros(1, 600).bfloat16(), even_spots(8)
    places = [int(600 * spot) for spot in spots]
    assert draw_at(backend, flat, SamplingParams(top_k=3), spots) == places
    assert draw_at(backend, flat, SamplingParams(top_p=0.2), spots) == places


def test_fewer_tokens_than_top_k(backend: Backend) -> None:
    logits = torch.full((2, 300), -torch.inf)
    logits[:, [3, 270]] = 0.5
    rows = [row(top_k=20, seed=1), row(top_k=299, top_p=0.9, min_p=0.3, seed=2)]
    for seed in range(8):
        found = tokens(run(backend, logits, *(replace(one, seed=seed) for one in rows)))
        assert found == oracle_tokens(logits, [replace(one, seed=seed) for one in rows])


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-40}, {"min_p": 1.0}])
def test_narrow_settings_are_greedy(backend: Backend, params: dict[str, Any]) -> None:
    logits = random_logits(10, 300)
    rows = [row(seed=seed, **params) for seed in range(10)]
    assert tokens(run(backend, logits, *rows)) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "params",
    [{"temperature": 0.0}, {}, {"top_p": 0.9, "top_k": 7}, {"presence_penalty": 1.0}, {"min_p": 0.2}],
)
def test_rows_that_are_not_finite_fail_alone(backend: Backend, bad: float, params: dict[str, Any]) -> None:
    logits = random_logits(3, 300)
    rows = [row(seed=seed, **params) for seed in range(3)]
    clean = run(backend, logits, *rows)
    logits[1, slice(None) if bad < 0 else 280] = bad
    found = run(backend, logits, *rows)
    expected = "all are minus infinity" if bad < 0 else "NaN or infinity is among them"
    assert found[1].error == f"the model's logits are not finite: {expected}"
    assert 0 <= found[1].token_id < 300
    assert (found[0], found[2]) == (clean[0], clean[2])


def test_adjusted_logits(backend: Backend) -> None:
    """The values themselves, and no other seat's counts."""
    vocab, device = 300, backend.device
    rows = [
        row(
            2, (4, 5, 5, 290), (6, 6, 7), repetition_penalty=1.7, frequency_penalty=0.3, presence_penalty=0.2
        ),
        row(0, (1,), (), logit_bias=((9, 1.5), (5, -2.0)), min_tokens=4, stop_token_ids=(9, 299)),
        row(3, (4,), (4, 4), logit_bias=((4, 2.0),), repetition_penalty=0.5, presence_penalty=-1.0),
    ]
    logits = random_logits(3, vocab)
    table = SeatTable(4, vocab, (EOS,))
    edits = torch.zeros((4, 16, 2), dtype=torch.int32)
    counts = torch.full((4, vocab), 77, dtype=torch.int32)
    for one in rows:
        assert one.history is not None
        found = torch.from_numpy(table.assign(one.seat, one.params, 0))
        edits[one.seat, : len(found)] = found
        counts[one.seat] = torch.bincount(torch.tensor(one.history[1], dtype=torch.int64), minlength=vocab)
        counts[one.seat, list(one.history[0])] |= PROMPT_FLAG
    seats, outputs = np.array([one.seat for one in rows]), np.array([one.num_outputs for one in rows])
    records = torch.from_numpy(table.records(seats, outputs).words)
    out = torch.full((3, vocab), torch.nan, device=device)
    backend.kernels.adjust_logits(
        logits.to(device), records.to(device), edits.to(device), counts.to(device), out
    )
    expected = np.stack([oracle_adjust(x.numpy(), one) for x, one in zip(logits, rows, strict=True)])
    np.testing.assert_allclose(out.cpu().numpy(), expected, rtol=1e-6, atol=1e-6)


def test_steps_in_flight_count_their_own_tokens(backend: Backend) -> None:
    """Several steps before the first wait: penalties know of tokens that the host has not seen."""
    story, num_steps = Story(penalized_rows()), 8
    sampler = make_sampler(11, len(story.rows) + 1, backend.kernels, backend.device)
    pending = []
    for step in range(num_steps):
        rows = [
            replace(one, num_outputs=one.num_outputs + step, history=one.history if step == 0 else None)
            for one in story.rows
        ]
        # In another order each time: a seat, not a place in the batch, is what a sequence keeps.
        order = np.random.default_rng(step).permutation(len(rows)).tolist()
        logits = story.logits(step)[order].to(backend.device)
        pending.append((order, sampler.launch(logits, [rows[index] for index in order])))
        logits.fill_(torch.nan)
    said: list[list[int]] = [[] for _ in story.rows]
    for order, launched in pending:
        for index, result in zip(order, launched.wait(), strict=True):
            said[index].append(result.token_id)
    assert said == story.expected(num_steps)
    assert sampler.last_tokens[: len(said)].tolist() == [own[-1] for own in said]


def test_wrong_arguments_are_named(device: torch.device) -> None:
    from kernels import triton_backend

    records = torch.zeros((1, 16), dtype=torch.int32, device=device)
    empty = torch.empty(0, dtype=torch.int32, device=device)
    last_tokens = torch.zeros(2, dtype=torch.int64, device=device)
    results = torch.zeros((1, 2), dtype=torch.int32, device=device)
    workspace = triton_backend.sampling_workspace(1, 600, device)
    logits = torch.zeros((1, 600), device=device)
    good: dict[str, Any] = {
        "logits": logits,
        "records": records,
        "filters": Filters(),
        "counts": empty,
        "last_tokens": last_tokens,
        "results": results,
        "workspace": workspace,
    }
    triton_backend.sample(**good)
    bad: dict[str, Any] = {
        "logits": logits.double(),
        "records": records[:, :8],
        "counts": empty.long(),
        "last_tokens": last_tokens.int(),
        "results": results.float(),
        "workspace": triton_backend.sampling_workspace(0, 600, device),
    }
    for name, value in bad.items():
        with pytest.raises(ValueError, match=f"^{name} must be"):
            triton_backend.sample(**{**good, name: value})


@contextmanager
def no_waiting() -> Iterator[None]:
    """Any wait of the host for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_launch_neither_waits_nor_allocates_nor_compiles(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kernels import triton_backend

    vocab, num_seats = 50_257, 40
    sampler = make_sampler(vocab, num_seats, triton_backend, device)
    sampler.warm_up(torch.bfloat16)
    compiled: list[str] = []
    monkeypatch.setattr(
        knobs.runtime, "jit_post_compile_hook", lambda **found: compiled.append(str(found["repr"]))
    )
    steady: list[dict[str, Any]] = [{"temperature": 0.0}, {}, {"top_p": 0.8}, {"top_k": 9, "min_p": 0.01}]
    asking: list[dict[str, Any]] = [{"presence_penalty": 0.5}, {"logit_bias": ((5, 1.0),), "top_p": 0.7}]
    logits = random_logits(num_seats, vocab).bfloat16().to(device)
    for num_rows in (1, 16, 33, 40):
        rows = [row(seat, seed=seat, **(steady + asking)[seat % 6]) for seat in range(num_rows)]
        with no_waiting():
            first = sampler.launch(logits, rows)
            second = sampler.launch(logits, [replace(one, history=None) for one in rows])
        assert tokens(first.wait()) == oracle_tokens(logits[:num_rows], rows)
        second.wait()
    rows = [row(seat, seed=seat, **steady[seat % 4]) for seat in range(num_seats)]
    sampler.launch(logits, rows).wait()
    steady_rows = [replace(one, history=None) for one in rows]
    allocations = torch.cuda.memory_stats(device)["allocation.all.allocated"]
    sampler.launch(logits, steady_rows).wait()
    assert torch.cuda.memory_stats(device)["allocation.all.allocated"] == allocations
    with no_waiting():
        pending = sampler.launch(logits, [row(seat, logprobs=3, seed=seat) for seat in range(num_seats)])
    found = pending.wait()
    best = torch.log_softmax(logits.float().cpu(), dim=-1).topk(3)
    assert found[7].logprobs is not None
    assert [value for _, value in found[7].logprobs.top] == pytest.approx(best.values[7].tolist(), abs=1e-4)
    assert not compiled
