"""The sampler against an oracle in numpy that does one row at a time and takes no short cut."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from engine.messages import GenerateRequest, SamplingParams
from engine.model.draw import draw, uniform
from engine.model.sampler import Sampled, Sampler
from engine.sequence import Sequence

CPU = torch.device("cpu")
EOS = 3


def sequence(
    prompt: tuple[int, ...] = (1,), output: tuple[int, ...] = (), seed: int = 0, **params: Any
) -> Sequence:
    request = GenerateRequest("r", prompt, SamplingParams(**params))
    return Sequence(request, seed, 0.0, output_token_ids=list(output))


def sample(logits: torch.Tensor, *sequences: Sequence) -> list[Sampled]:
    return Sampler(logits.shape[1], (EOS,), CPU).sample(logits, sequences)


def random_logits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return 3.0 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def oracle_adjust(logits: np.ndarray, seq: Sequence) -> np.ndarray:
    x, p = logits.astype(np.float64).copy(), seq.sampling
    for token, bias in p.logit_bias:
        x[token] += bias
    if len(seq.output_token_ids) < p.min_tokens:
        for token in [*p.stop_token_ids, *([] if p.ignore_eos else [EOS])]:
            x[token] = -np.inf
    for token in set(seq.prompt_token_ids) | set(seq.output_token_ids):
        x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
    for token, count in Counter(seq.output_token_ids).items():
        x[token] -= p.presence_penalty + p.frequency_penalty * count
    return x


def oracle_probabilities(logits: np.ndarray, seq: Sequence) -> np.ndarray:
    p = seq.sampling
    x = oracle_adjust(logits, seq) / p.temperature
    probabilities = np.exp(x - x.max())
    probabilities /= probabilities.sum()
    probabilities[probabilities < p.min_p * probabilities.max()] = 0.0
    order = np.argsort(-probabilities, kind="stable")
    if p.top_k:
        probabilities[order[p.top_k :]] = 0.0
    probabilities /= probabilities.sum()
    if p.top_p < 1.0:
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= p.top_p]] = 0.0
    return probabilities / probabilities.sum()


def oracle_token(logits: np.ndarray, seq: Sequence) -> int:
    if seq.sampling.temperature == 0.0:
        return int(np.argmax(oracle_adjust(logits, seq)))
    sums = np.cumsum(oracle_probabilities(logits, seq))
    spot = uniform(seq.seed, len(seq.output_token_ids))
    return int(np.searchsorted(sums, spot * sums[-1], side="right"))


VARIANTS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.0},
    {"top_k": 5},
    {"top_k": 100_000},
    {"top_p": 0.7},
    {"top_p": 0.01},
    {"top_p": 0.999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3},
    {"presence_penalty": 1.5, "frequency_penalty": 0.7, "temperature": 0.0},
    {"presence_penalty": -2.0, "frequency_penalty": -1.0},
    {"repetition_penalty": 1.8, "temperature": 0.0},
    {"repetition_penalty": 0.5, "presence_penalty": 0.5},
    {"logit_bias": ((7, 50.0), (8, -50.0)), "temperature": 0.0},
    {"logit_bias": ((7, 4.0), (7, 3.0)), "top_p": 0.8},
    {"min_tokens": 16, "stop_token_ids": (5, 9)},
    {"min_tokens": 16, "stop_token_ids": (5,), "ignore_eos": True, "temperature": 0.0},
    {"min_tokens": 16, "logit_bias": ((EOS, 100.0),), "temperature": 0.0},
]


def varied_batch(vocab: int, seeds: int = 4) -> list[Sequence]:
    prompt, output = tuple(range(2, vocab, 5)), (4, 4, 4, 6, 11, vocab - 1)
    return [
        sequence(prompt, output, seed=1000 * number - 7, **variant)
        for number in range(seeds)
        for variant in VARIANTS
    ]


@pytest.mark.parametrize("vocab", [13, 997, 5000])
def test_every_parameter_agrees_with_the_oracle(vocab: int) -> None:
    batch = varied_batch(vocab)
    logits = random_logits(len(batch), vocab)
    before = logits.clone()
    found = [result.token_id for result in sample(logits, *batch)]
    wanted = [oracle_token(row.numpy(), seq) for row, seq in zip(before, batch, strict=True)]
    assert found == wanted
    assert torch.equal(logits, before), "the logits belong to the caller"


def test_tokens_do_not_depend_on_the_batch() -> None:
    batch = varied_batch(2000, seeds=2)
    logits = random_logits(len(batch), 2000, seed=1)
    together = [result.token_id for result in sample(logits, *batch)]
    alone = [sample(logits[row : row + 1], seq)[0].token_id for row, seq in enumerate(batch)]
    assert together == alone


def test_flat_distributions_need_more_than_the_first_candidates() -> None:
    # 5,000 nearly equal tokens: 1,024 of them hold a fifth of the mass.
    logits = 0.01 * random_logits(3, 5000)
    batch = [
        sequence(seed=5, top_p=0.9),
        sequence(seed=6, top_k=3000),
        sequence(seed=7, top_k=1024, top_p=0.5),
    ]
    for number in range(30):
        for seq in batch:
            seq.output_token_ids.append(number)
        found = [result.token_id for result in sample(logits, *batch)]
        assert found == [oracle_token(row.numpy(), seq) for row, seq in zip(logits, batch, strict=True)]


@pytest.mark.parametrize("params", [{}, {"top_p": 0.8}, {"top_k": 4}, {"min_p": 0.2}, {"temperature": 1.7}])
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    logits, draws = random_logits(1, 12, seed=2), 4000
    batch = [sequence(seed=seed, **params) for seed in range(draws)]
    tokens = [result.token_id for result in sample(logits.expand(draws, -1), *batch)]
    counts = np.bincount(tokens, minlength=12)
    expected = draws * oracle_probabilities(logits[0].numpy(), batch[0])
    assert not counts[expected == 0].any()
    common = expected > 5
    chi_square = float((((counts - expected) ** 2)[common] / expected[common]).sum())
    # Fixed seeds: 11 degrees of freedom exceed 31.3 once in a thousand honest samples.
    assert chi_square < 31.3


def test_uniform_numbers_are_even_and_unrelated() -> None:
    by_seed = np.array([uniform(seed, 0) for seed in range(-5000, 5000)])
    by_count = np.array([uniform(42, count) for count in range(10_000)])
    for numbers in (by_seed, by_count):
        assert 0.0 < numbers.min() < 0.001 < 0.999 < numbers.max() < 1.0
        assert abs(numbers.mean() - 0.5) < 0.01
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03
    assert len({uniform(seed, count) for seed in range(100) for count in range(100)}) == 10_000
    assert uniform(-1, 3) == uniform(2**64 - 1, 3) != uniform(1, 3)


def test_extreme_spots_stay_inside_the_support() -> None:
    logits = torch.tensor([[-torch.inf, 1.0, 1.0, -torch.inf]])
    params = [SamplingParams()]
    assert draw(logits, params, [0.5 / 2**48]).tolist() == [1]
    assert draw(logits, params, [1 - 0.5 / 2**48]).tolist() == [2]


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-6}, {"min_p": 1.0}])
def test_narrow_settings_are_greedy(params: dict[str, Any]) -> None:
    logits = random_logits(50, 300)
    batch = [sequence(seed=seed, **params) for seed in range(50)]
    assert [result.token_id for result in sample(logits, *batch)] == logits.argmax(-1).tolist()


def test_equals_at_the_threshold_are_kept_together() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    tokens = {sample(logits, sequence(seed=seed, top_k=2))[0].token_id for seed in range(200)}
    assert tokens == {0, 1, 2, 3}


def test_out_of_range_stop_ids_are_harmless() -> None:
    seq = sequence(min_tokens=2, max_tokens=4, stop_token_ids=(10**9, -1), temperature=0.0)
    logits = random_logits(1, 20)
    assert sample(logits, seq)[0] == sample(logits, sequence(temperature=0.0))[0]


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = random_logits(4, 50)
    batch = [
        sequence(logprobs=3, temperature=0.0, logit_bias=((17, 100.0),)),
        sequence(temperature=0.0),
        sequence(logprobs=0, temperature=0.5, seed=8),
        sequence(logprobs=20, temperature=2.0, top_k=2, seed=9),
    ]
    found = sample(logits, *batch)
    raw = torch.log_softmax(logits.double(), dim=-1)
    assert found[0].token_id == 17
    assert found[1].logprobs is None
    for row, count in ((0, 3), (2, 0), (3, 20)):
        logprobs = found[row].logprobs
        assert logprobs is not None
        assert logprobs.logprob == pytest.approx(float(raw[row, found[row].token_id]), abs=1e-5)
        best = raw[row].topk(count)
        assert [token for token, _ in logprobs.top] == best.indices.tolist()
        assert [value for _, value in logprobs.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_more_logprobs_than_tokens() -> None:
    found = sample(random_logits(1, 5), sequence(logprobs=20))
    assert found[0].logprobs is not None
    assert len(found[0].logprobs.top) == 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "params",
    [{"temperature": 0.0}, {}, {"top_p": 0.9, "top_k": 7, "min_p": 0.1}, {"logprobs": 2}, {"min_tokens": 1}],
)
def test_a_row_that_is_not_finite_fails_alone(bad: float, params: dict[str, Any]) -> None:
    logits = random_logits(3, 40)
    clean = sample(logits, *(sequence(seed=row, **params) for row in range(3)))
    logits[1, 11] = bad
    found = sample(logits, *(sequence(seed=row, **params) for row in range(3)))
    assert found[1].error is not None
    assert 0 <= found[1].token_id < 40
    assert (found[0], found[2]) == (clean[0], clean[2])


def test_a_row_without_any_token_left_is_an_error() -> None:
    logits = torch.full((2, 6), -torch.inf)
    logits[1, 2] = 0.0
    found = sample(logits, sequence(), sequence())
    assert found[0].error is not None
    assert found[1] == Sampled(2)


def test_half_precision_logits() -> None:
    logits = random_logits(6, 400).bfloat16()
    batch = [sequence(seed=seed, top_p=0.9, presence_penalty=0.5, output=(3, 5)) for seed in range(6)]
    found = [result.token_id for result in sample(logits, *batch)]
    assert found == [oracle_token(row.float().numpy(), seq) for row, seq in zip(logits, batch, strict=True)]


def test_no_rows() -> None:
    assert sample(torch.empty(0, 10)) == []
