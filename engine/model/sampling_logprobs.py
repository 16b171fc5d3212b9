"""Log probabilities from the raw logits, for the rows that want them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.messages import TokenLogprobs

_ROWS = 32  # at a time: their float32 copies are 16 MiB for a vocabulary of 128,256


@dataclass(frozen=True, slots=True)
class RawLogprobs:
    """What is known before a token is chosen, on the device.

    Attributes:
        rows, seats: (wanting rows,) int32, of the logits and of the newest tokens.
        totals: (wanting rows, 1) float32, the logarithm of the sum of exp(logits).
        values, ids: (wanting rows, alternatives) the largest logits, best first, and their tokens.
    """

    rows: torch.Tensor
    seats: torch.Tensor
    totals: torch.Tensor
    values: torch.Tensor
    ids: torch.Tensor


def raw_logprobs(logits: torch.Tensor, rows: torch.Tensor, seats: torch.Tensor, num_top: int) -> RawLogprobs:
    """Enqueue what needs no token. `num_top` alternatives, or the whole vocabulary if it has fewer."""
    totals, values, ids = [], [], []
    for some in torch.split(rows, _ROWS):
        wanting = logits.index_select(0, some).float()
        top = wanting.topk(min(num_top, logits.shape[1]), dim=-1)
        totals.append(wanting.logsumexp(dim=-1, keepdim=True))
        values.append(top.values)
        ids.append(top.indices)
    return RawLogprobs(rows, seats, torch.cat(totals), torch.cat(values), torch.cat(ids))


def details(logits: torch.Tensor, raw: RawLogprobs, last_tokens: torch.Tensor) -> torch.Tensor:
    """(wanting rows, 1 + 2 * alternatives) float64, which holds ids exactly: what `parse` reads."""
    tokens = last_tokens.index_select(0, raw.seats)
    chosen = logits[raw.rows.long(), tokens].float()[:, None] - raw.totals
    return torch.cat([chosen.double(), (raw.values - raw.totals).double(), raw.ids.double()], dim=1)


def parse(row: Sequence[float], num_wanted: int) -> TokenLogprobs:
    """One row of `details`, less the alternatives that only others wanted."""
    num_top = len(row) // 2
    pairs = zip(row[1 + num_top :], row[1 : 1 + num_top], strict=True)
    return TokenLogprobs(row[0], tuple((int(token), value) for token, value in pairs)[:num_wanted])
