"""What requests change about logits before a token is chosen: biases, bans and penalties.

Everything is sparse: (row, token, amount) lists made on the host for the rows that ask, applied to
all of them by one indexed operation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as Rows

import torch

from engine.messages import SamplingParams
from engine.sequence import Sequence

_Entry = tuple[int, int, float]


def adjust(logits: torch.Tensor, sequences: Rows[Sequence], eos_token_ids: tuple[int, ...]) -> torch.Tensor:
    """logit_bias, min_tokens, then repetition, presence and frequency penalties.

    Args:
        logits: (rows, vocab), left as they are.

    Returns:
        The logits themselves if no row asks for anything, else an adjusted float32 copy.
    """
    if not any(_asks(seq) for seq in sequences):
        return logits
    adjusted = logits.to(torch.float32, copy=True)
    _add(adjusted, [entry for row, seq in enumerate(sequences) for entry in _biases(row, seq)])
    _add(
        adjusted,
        [entry for row, seq in enumerate(sequences) for entry in _bans(row, seq, eos_token_ids)],
    )
    _repel(adjusted, [entry for row, seq in enumerate(sequences) for entry in _repetitions(row, seq)])
    _add(adjusted, [entry for row, seq in enumerate(sequences) for entry in _additive(row, seq)])
    return adjusted


def _asks(seq: Sequence) -> bool:
    params = seq.sampling
    return bool(params.logit_bias) or _is_short(seq) or _is_penalised(params)


def _is_short(seq: Sequence) -> bool:
    return len(seq.output_token_ids) < seq.sampling.min_tokens


def _is_penalised(params: SamplingParams) -> bool:
    additive = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
    return additive or params.repetition_penalty != 1.0


def _biases(row: int, seq: Sequence) -> Iterator[_Entry]:
    return ((row, token, bias) for token, bias in seq.sampling.logit_bias)


def _bans(row: int, seq: Sequence, eos_token_ids: tuple[int, ...]) -> Iterator[_Entry]:
    """Stop tokens of a sequence that may not stop yet. With ignore_eos the model's own are none."""
    if not _is_short(seq):
        return iter(())
    own = () if seq.sampling.ignore_eos else eos_token_ids
    return ((row, token, -torch.inf) for token in {*own, *seq.sampling.stop_token_ids})


def _repetitions(row: int, seq: Sequence) -> Iterator[_Entry]:
    penalty = seq.sampling.repetition_penalty
    if penalty == 1.0:
        return iter(())
    seen = set(seq.prompt_token_ids).union(seq.output_token_ids)
    return ((row, token, penalty) for token in seen)


def _additive(row: int, seq: Sequence) -> Iterator[_Entry]:
    presence, frequency = seq.sampling.presence_penalty, seq.sampling.frequency_penalty
    if presence == 0.0 and frequency == 0.0:
        return iter(())
    counts = Counter(seq.output_token_ids)
    return ((row, token, -presence - frequency * count) for token, count in counts.items())


def _indices(logits: torch.Tensor, entries: list[_Entry]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Entries as index tensors. Ids past the vocabulary, which no logit can choose, are left out."""
    width = logits.shape[1]
    entries = [entry for entry in entries if 0 <= entry[1] < width]
    places = torch.tensor([entry[:2] for entry in entries], dtype=torch.int64).reshape(-1, 2)
    rows, tokens = places.to(logits.device).unbind(1)
    amounts = torch.tensor([entry[2] for entry in entries], dtype=logits.dtype).to(logits.device)
    return rows, tokens, amounts


def _add(logits: torch.Tensor, entries: list[_Entry]) -> None:
    if entries:
        rows, tokens, amounts = _indices(logits, entries)
        logits.index_put_((rows, tokens), amounts, accumulate=True)


def _repel(logits: torch.Tensor, entries: list[_Entry]) -> None:
    """Divide positive logits by the penalty and multiply negative ones: both fall."""
    if entries:
        rows, tokens, penalties = _indices(logits, entries)
        values = logits[rows, tokens]
        logits[rows, tokens] = torch.where(values > 0, values / penalties, values * penalties)
