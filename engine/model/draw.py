"""Random choice of tokens: temperature, truncation (min_p, top_k, top_p) and the draw itself.

A draw spends one number that depends on the sequence's seed and on how many tokens it has, and on
nothing else: not on its neighbours in the batch, not on a generator's state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.messages import SamplingParams

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_UNIFORM_BITS = 48
# How many of the likeliest tokens top_p looks at first. Sorting a whole vocabulary costs 50 times as
# much (28 ms a row of 49,152 on a CPU), and this many nearly always hold the mass that is asked for.
_CANDIDATES = 1024


def uniform(seed: int, count: int) -> float:
    """The number in (0, 1) that chooses token `count` of a sequence: splitmix64 of both.

    48 bits and a half, so that its product with a float64 total stays below the total.
    """
    state = _mix(seed & _MASK)
    bits = _mix((state + (count + 1) * _GOLDEN) & _MASK) >> (64 - _UNIFORM_BITS)
    return (bits + 0.5) / (1 << _UNIFORM_BITS)


def _mix(z: int) -> int:
    """The finaliser of splitmix64: a bijection of 64-bit numbers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def draw(logits: torch.Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> torch.Tensor:
    """One token a row by inverting the cumulative distribution in vocabulary order.

    Args:
        logits: (rows, vocab), left as they are.
        params: with a temperature above 0.
        uniforms: one number in (0, 1) a row.

    Returns:
        (rows,) int64. A row of logits that are not finite yields some valid token.
    """
    settings = [(p.temperature, p.min_p, u) for p, u in zip(params, uniforms, strict=True)]
    temperature, min_p, spot = torch.tensor(settings, dtype=torch.float64).to(logits.device).unbind(1)
    scores = logits.float()
    # With the largest score at 0, no temperature makes exp() overflow.
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / temperature.float()[:, None]
    if any(p.min_p > 0.0 for p in params):
        scores.masked_fill_(scores < min_p.log().float()[:, None], -torch.inf)
    truncated = [row for row, p in enumerate(params) if _truncates(p, scores.shape[1])]
    if truncated:
        _truncate(scores, truncated, params)
    # float32 would lose the rare tokens of a large vocabulary in the sum.
    sums = scores.exp_().cumsum(dim=-1, dtype=torch.float64)
    tokens = torch.searchsorted(sums, (spot * sums[:, -1])[:, None], right=True)[:, 0]
    return tokens.clamp_(max=scores.shape[1] - 1)


def _truncates(params: SamplingParams, vocab_size: int) -> bool:
    return 0 < params.top_k < vocab_size or params.top_p < 1.0


def _truncate(scores: torch.Tensor, rows: list[int], params: Sequence[SamplingParams]) -> None:
    """Set what top_k and top_p drop to minus infinity, in place.

    Both become one threshold a row. Tokens as likely as the last one kept are kept too, so that the
    result does not hang on the order in which a sort leaves equals.
    """
    vocab_size = scores.shape[1]
    part = scores[rows]
    top_k = [params[row].top_k or vocab_size for row in rows]
    top_p = torch.tensor([params[row].top_p for row in rows], dtype=torch.float64).to(scores.device)
    limits = torch.tensor(top_k, device=scores.device).clamp_(max=vocab_size)
    totals = part.exp().sum(dim=-1, dtype=torch.float64)
    width = min(vocab_size, max([_CANDIDATES, *(k for k in top_k if k < vocab_size)]))
    thresholds, is_enough = _thresholds(part, limits, top_p, totals, width)
    if width < vocab_size and not bool(is_enough.all()):
        thresholds = torch.where(
            is_enough, thresholds, _thresholds(part, limits, top_p, totals, vocab_size)[0]
        )
    scores[rows] = part.masked_fill_(part < thresholds[:, None], -torch.inf)


def _thresholds(
    scores: torch.Tensor, limits: torch.Tensor, top_p: torch.Tensor, totals: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest score each row keeps, and whether its `width` likeliest tokens were enough to tell."""
    best = scores.topk(width, dim=-1).values
    is_within = torch.arange(width, device=scores.device) < limits[:, None]
    mass = best.exp().double().masked_fill_(~is_within, 0.0).cumsum(dim=-1)
    kept_by_k = limits <= width
    target = top_p * torch.where(kept_by_k, mass[:, -1], totals)
    reached = mass[:, -1] >= target
    num_kept = (mass < target[:, None]).sum(dim=-1) + 1
    num_kept = torch.minimum(num_kept, limits).clamp_(max=width)
    is_enough = kept_by_k | reached
    return best.gather(1, num_kept[:, None] - 1)[:, 0], is_enough
