"""The sampler on the CPU against an oracle that does one row at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from engine.model.sampler import Sampled
from tests.unit.sampling_cases import (
    Story,
    make_sampler,
    oracle_probabilities,
    oracle_tokens,
    penalized_rows,
    random_logits,
    row,
    sample,
    varied_rows,
)


@pytest.mark.parametrize("vocab", [13, 997, 5000])
def test_every_parameter_agrees_with_the_oracle(vocab: int) -> None:
    rows = varied_rows(vocab)
    logits = random_logits(len(rows), vocab)
    before = logits.clone()
    assert [result.token_id for result in sample(logits, *rows)] == oracle_tokens(before, rows)
    assert torch.equal(logits, before), "the logits belong to the caller"


def test_tokens_do_not_depend_on_the_batch() -> None:
    rows = varied_rows(2000, seeds=2)
    logits = random_logits(len(rows), 2000, seed=1)
    together = [result.token_id for result in sample(logits, *rows)]
    alone = [sample(logits[index : index + 1], one)[0].token_id for index, one in enumerate(rows)]
    assert together == alone


def test_flat_distributions_need_more_than_the_first_candidates() -> None:
    # 5,000 nearly equal tokens: 1,024 of them hold a fifth of the mass.
    logits = 0.01 * random_logits(3, 5000)
    for number in range(30):
        output = tuple(range(number))
        rows = [
            row(output=output, seed=5, top_p=0.9),
            row(output=output, seed=6, top_k=3000),
            row(output=output, seed=7, top_k=1024, top_p=0.5),
        ]
        assert [result.token_id for result in sample(logits, *rows)] == oracle_tokens(logits, rows)


@pytest.mark.parametrize("params", [{}, {"top_p": 0.8}, {"top_k": 4}, {"min_p": 0.2}, {"temperature": 1.7}])
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    logits, draws = random_logits(1, 12, seed=2), 4000
    rows = [row(seed=seed, **params) for seed in range(draws)]
    tokens = [result.token_id for result in sample(logits.expand(draws, -1), *rows)]
    counts = np.bincount(tokens, minlength=12)
    expected = draws * oracle_probabilities(logits[0].numpy(), rows[0])
    assert not counts[expected == 0].any()
    common = expected > 5
    chi_square = float((((counts - expected) ** 2)[common] / expected[common]).sum())
    # Fixed seeds: 11 degrees of freedom exceed 31.3 once in a thousand honest samples.
    assert chi_square < 31.3


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-6}, {"min_p": 1.0}])
def test_narrow_settings_are_greedy(params: dict[str, Any]) -> None:
    logits = random_logits(50, 300)
    rows = [row(seed=seed, **params) for seed in range(50)]
    assert [result.token_id for result in sample(logits, *rows)] == logits.argmax(-1).tolist()


def test_equals_at_the_threshold_are_kept_together() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    tokens = {sample(logits, row(seed=seed, top_k=2))[0].token_id for seed in range(200)}
    assert tokens == {0, 1, 2, 3}


def test_out_of_range_stop_ids_are_harmless() -> None:
    one = row(min_tokens=2, max_tokens=4, stop_token_ids=(10**9, -1), temperature=0.0)
    logits = random_logits(1, 20)
    assert sample(logits, one)[0] == sample(logits, row(temperature=0.0))[0]


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = random_logits(4, 50)
    rows = [
        row(logprobs=3, temperature=0.0, logit_bias=((17, 100.0),)),
        row(temperature=0.0),
        row(logprobs=0, temperature=0.5, seed=8),
        row(logprobs=20, temperature=2.0, top_k=2, seed=9),
    ]
    found = sample(logits, *rows)
    raw = torch.log_softmax(logits.double(), dim=-1)
    assert found[0].token_id == 17
    assert found[1].logprobs is None
    for index, count in ((0, 3), (2, 0), (3, 20)):
        logprobs = found[index].logprobs
        assert logprobs is not None
        assert logprobs.logprob == pytest.approx(float(raw[index, found[index].token_id]), abs=1e-5)
        best = raw[index].topk(count)
        assert [token for token, _ in logprobs.top] == best.indices.tolist()
        assert [value for _, value in logprobs.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_more_logprobs_than_tokens_and_more_rows_than_a_slice() -> None:
    found = sample(random_logits(70, 5), *(row(logprobs=20 if index % 2 else 1) for index in range(70)))
    for index, one in enumerate(found):
        assert one.logprobs is not None
        assert len(one.logprobs.top) == (5 if index % 2 else 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "params",
    [{"temperature": 0.0}, {}, {"top_p": 0.9, "top_k": 7, "min_p": 0.1}, {"logprobs": 2}, {"min_tokens": 1}],
)
def test_a_row_that_is_not_finite_fails_alone(bad: float, params: dict[str, Any]) -> None:
    logits = random_logits(3, 40)
    rows = [row(seed=seed, **params) for seed in range(3)]
    clean = sample(logits, *rows)
    logits[1, 11] = bad
    found = sample(logits, *rows)
    assert found[1].error == "the model's logits are not finite: NaN or infinity is among them"
    assert 0 <= found[1].token_id < 40
    assert (found[0], found[2]) == (clean[0], clean[2])


def test_a_row_without_any_token_left_is_an_error() -> None:
    logits = torch.full((2, 6), -torch.inf)
    logits[1, 2] = 0.0
    found = sample(logits, row(), row())
    assert found[0].error == "the model's logits are not finite: all are minus infinity"
    assert found[1] == Sampled(2)


def test_half_precision_logits() -> None:
    logits = random_logits(6, 400).bfloat16()
    rows = [row(seed=seed, top_p=0.9, presence_penalty=0.5, output=(3, 5)) for seed in range(6)]
    assert [result.token_id for result in sample(logits, *rows)] == oracle_tokens(logits, rows)


def test_no_rows() -> None:
    assert make_sampler(10, 1).launch(torch.empty(0, 10), []).wait() == []


def test_padding_rows_of_logits_are_left_alone() -> None:
    logits = random_logits(8, 30)
    logits[3:] = torch.nan
    rows = [row(seed=seed, presence_penalty=0.1) for seed in range(3)]
    assert sample(logits, *rows) == sample(logits[:3], *rows)


def test_a_preempted_sequence_goes_on_in_another_seat() -> None:
    """Another sequence uses the seat meanwhile; what it leaves there is forgotten."""
    story, sampler = Story(penalized_rows()[:3]), make_sampler(11, 3)
    expected = story.expected(6)
    said: list[list[int]] = [[] for _ in story.rows]
    places = [0, 1, 2]
    for step in range(6):
        rows = []
        is_new = step in (0, 3)
        if step == 3:
            places = [2, 0, 1]
        for place, one, own in zip(places, story.rows, said, strict=True):
            assert one.history is not None
            history = (one.history[0], (*one.history[1], *own)) if is_new else None
            rows.append(replace(one, seat=place, num_outputs=one.num_outputs + len(own), history=history))
        for own, result in zip(said, sampler.launch(story.logits(step), rows).wait(), strict=True):
            own.append(result.token_id)
    assert said == expected


def test_results_outlive_later_steps() -> None:
    sampler = make_sampler(20, 2)
    logits = [random_logits(2, 20, seed=seed) for seed in range(12)]
    rows = [row(0, temperature=0.0, logprobs=2), row(1, temperature=0.0)]
    pending = []
    for one in logits:
        mine = one.clone()
        pending.append(sampler.launch(mine, rows))
        mine.fill_(torch.nan)
    for one, launched in zip(logits, pending, strict=True):
        found = launched.wait()
        assert [result.token_id for result in found] == one.argmax(-1).tolist()
        assert found[0].logprobs is not None
        assert found[0].logprobs.top[0][0] == found[0].token_id
        assert launched.wait() == found


def test_many_biases_and_long_histories() -> None:
    """More than the buffers are made for at first."""
    vocab = 50_000
    logits = random_logits(2, vocab)
    biases = tuple((token, float(token % 7)) for token in range(0, 3000, 3))
    rows = [
        row(0, tuple(range(40_000)), tuple(range(0, 9000, 2)), repetition_penalty=1.5, frequency_penalty=1.0),
        row(1, logit_bias=biases, top_p=0.3, seed=3),
    ]
    assert [result.token_id for result in sample(logits, *rows)] == oracle_tokens(logits, rows)


def test_warm_up_leaves_the_seats_alone() -> None:
    sampler = make_sampler(30, 4)
    sampler.warm_up(torch.float32)
    assert not sampler.last_tokens.any()
