"""What tests of sampling share: rows, logits, and an oracle in numpy that takes one row at a time and no
short cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from engine.messages import SamplingParams
from engine.model.sampler import Sampled, Sampler, SampleRow
from kernels import reference
from kernels.backend import Kernels

CPU = torch.device("cpu")
EOS = 3
_MASK = (1 << 64) - 1


def row(
    seat: int = 0, prompt: tuple[int, ...] = (1,), output: tuple[int, ...] = (), seed: int = 0, **params: Any
) -> SampleRow:
    """A sequence that has just been given its seat."""
    return SampleRow(seat, SamplingParams(**params), seed, len(output), (prompt, output))


def make_sampler(
    vocab: int, num_seats: int, kernels: Kernels = reference, device: torch.device = CPU
) -> Sampler:
    """A sampler whose one end-of-sequence token is EOS."""
    return Sampler(vocab, (EOS,), device, num_seats, kernels)


def sample(logits: torch.Tensor, *rows: SampleRow, kernels: Kernels = reference) -> list[Sampled]:
    """One step of a new sampler; the rows are moved to seats of their own."""
    rows = tuple(replace(one, seat=seat) for seat, one in enumerate(rows))
    sampler = make_sampler(logits.shape[1], max(1, len(rows)), kernels, logits.device)
    return sampler.launch(logits, rows).wait()


def random_logits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    """Normal values with a standard deviation of 3."""
    return 3.0 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def uniform(seed: int, count: int) -> float:
    """splitmix64 in Python's integers."""
    state = (_mix(seed & _MASK) + (count + 1) * 0x9E3779B97F4A7C15) & _MASK
    return ((_mix(state) >> 16) + 0.5) / (1 << 48)


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def oracle_adjust(logits: np.ndarray, one: SampleRow) -> np.ndarray:
    """Logits after biases, bans and penalties, float64."""
    x, p = logits.astype(np.float64).copy(), one.params
    assert one.history is not None
    prompt, output = one.history
    for token, bias in p.logit_bias:
        x[token] += bias
    if one.num_outputs < p.min_tokens:
        for token in [*p.stop_token_ids, *([] if p.ignore_eos else [EOS])]:
            x[token] = -np.inf
    for token in {*prompt, *output}:
        x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
    for token, count in Counter(output).items():
        x[token] -= p.presence_penalty + p.frequency_penalty * count
    return x


def oracle_probabilities(logits: np.ndarray, one: SampleRow) -> np.ndarray:
    """What a draw follows; tokens as likely as the last one that top_k or top_p keeps are kept too."""
    p = one.params
    x = oracle_adjust(logits, one) / p.temperature
    probabilities = np.exp(x - x.max())
    probabilities[probabilities < p.min_p] = 0.0
    best = -np.sort(-probabilities)[: p.top_k or None]
    last = len(best) - 1
    if p.top_p < 1.0:
        mass = np.cumsum(best)
        last = int(np.searchsorted(mass, p.top_p * mass[-1]))
    probabilities[probabilities < best[last]] = 0.0
    return probabilities / probabilities.sum()


def oracle_token(logits: np.ndarray, one: SampleRow) -> int:
    """The token that the row becomes."""
    if one.params.temperature == 0.0:
        return int(np.argmax(oracle_adjust(logits, one)))
    sums = np.cumsum(oracle_probabilities(logits, one))
    return int(np.searchsorted(sums, uniform(one.seed, one.num_outputs) * sums[-1], side="right"))


def oracle_tokens(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """`oracle_token` of every row."""
    return [oracle_token(x.numpy(), one) for x, one in zip(logits.float().cpu(), rows, strict=True)]


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
    {"repetition_penalty": 1.3, "top_k": 7, "top_p": 0.9},
    {"logit_bias": ((7, 50.0), (8, -50.0)), "temperature": 0.0},
    {"logit_bias": ((7, 4.0), (7, 3.0)), "top_p": 0.8},
    {"logit_bias": ((7, 4.0), (4, 3.0)), "repetition_penalty": 1.5, "frequency_penalty": 0.1},
    {"min_tokens": 16, "stop_token_ids": (5, 9)},
    {"min_tokens": 16, "stop_token_ids": (5,), "ignore_eos": True, "temperature": 0.0},
    {"min_tokens": 16, "logit_bias": ((EOS, 100.0),), "temperature": 0.0},
]
for _variant in VARIANTS:
    _variant.setdefault("max_tokens", 32)


class Story:
    """Sequences that go on for several steps, and the tokens of an oracle that sees all of them."""

    def __init__(self, rows: list[SampleRow], vocab: int = 11) -> None:
        self.rows = rows
        self._vocab = vocab

    def logits(self, step: int) -> torch.Tensor:
        """(rows, vocab) of one step."""
        return random_logits(len(self.rows), self._vocab, seed=100 + step)

    def expected(self, num_steps: int) -> list[list[int]]:
        """Tokens by sequence, each chosen with all before it in its history."""
        said: list[list[int]] = [[] for _ in self.rows]
        for step in range(num_steps):
            known = []
            for one, own in zip(self.rows, said, strict=True):
                assert one.history is not None
                history = (one.history[0], (*one.history[1], *own))
                known.append(replace(one, num_outputs=one.num_outputs + len(own), history=history))
            for own, token in zip(said, oracle_tokens(self.logits(step), known), strict=True):
                own.append(token)
        return said


def penalized_rows() -> list[SampleRow]:
    """Sequences whose next token depends on the ones before, beside some that do not."""
    settings: list[dict[str, Any]] = [
        {"frequency_penalty": 2.0, "temperature": 0.0},
        {"presence_penalty": 2.0, "top_p": 0.6},
        {"repetition_penalty": 3.0, "top_k": 3},
        {"min_tokens": 3, "max_tokens": 9, "logit_bias": ((3, 30.0),)},
        {"temperature": 0.0},
        {},
    ]
    return [
        row(seat, (1, 2), (4,) if seat % 2 else (), seed=seat, **one) for seat, one in enumerate(settings)
    ]


def varied_rows(vocab: int, seeds: int = 4) -> list[SampleRow]:
    """Every variant with several seeds, in seats of their own."""
    prompt, output = tuple(range(2, vocab, 5)), (4, 4, 4, 6, 11, vocab - 1)
    settings = [(number, variant) for number in range(seeds) for variant in VARIANTS]
    return [
        row(seat, prompt, output, seed=1000 * number - 7, **variant)
        for seat, (number, variant) in enumerate(settings)
    ]
