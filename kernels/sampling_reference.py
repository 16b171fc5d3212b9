"""Sampling in plain PyTorch: what `kernels.reference` says of it, in a file of its own.

logits    (any rows, vocab)                float32, bfloat16 or float16, any stride over rows
records   (rows, RECORD_WORDS) int32       what each row is to become: `kernels.sampling_record`
edits     (seats, entries, 2) int32        biases and bans of a seat, each token once: the token's
                                           id, with BAN_FLAG if it ends the sequence, and the bits
                                           of the float32 to add
counts    (seats, vocab) int32             how often the seat has said a token, and PROMPT_FLAG
"""

from __future__ import annotations

import torch

from kernels.sampling_record import (
    BAN_FLAG,
    FREQUENCY,
    IS_PENALIZED,
    IS_SHORT,
    LOG_MIN_P,
    NUM_EDITS,
    PRESENCE,
    PROMPT_FLAG,
    REPETITION,
    SEAT,
    SOURCE,
    TARGET,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    UNIFORM,
    Filters,
)

# How many of the likeliest tokens top_p looks at first. Sorting a whole vocabulary costs 50 times as
# much (28 ms a row of 49,152 on a CPU), and this many nearly always hold the mass that is asked for.
_CANDIDATES = 1024


def sampling_workspace(num_rows: int, vocab_size: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """What `sample` keeps between its kernels, for batches of up to `num_rows`. Nothing here."""
    return ()


def adjust_logits(
    logits: torch.Tensor, records: torch.Tensor, edits: torch.Tensor, counts: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """Biases, bans, then repetition, presence and frequency penalties.

    Args:
        logits: row TARGET of a record is the record's; left as they are.
        out: (rows, vocab) float32, one row a record; written and returned.
    """
    numbers = records.view(torch.float32)
    for row, (record, number) in enumerate(zip(records.tolist(), numbers.tolist(), strict=True)):
        x, seat = out[row], record[SEAT]
        x.copy_(logits[record[TARGET]])
        if record[NUM_EDITS]:
            tokens, amounts = edits[seat, : record[NUM_EDITS]].unbind(1)
            ids = (tokens & ~BAN_FLAG).long()
            x[ids] += amounts.view(torch.float32)
            if record[IS_SHORT]:
                x[ids[(tokens & BAN_FLAG) != 0]] = -torch.inf
        if record[IS_PENALIZED]:
            _penalize(x, counts[seat], number)
    return out


def _penalize(x: torch.Tensor, counts: torch.Tensor, record: list[float]) -> None:
    seen = counts.nonzero()[:, 0]
    values, times = x[seen], counts[seen] & ~PROMPT_FLAG
    penalty = record[REPETITION]
    values = torch.where(values > 0, values / penalty, values * penalty)
    additive = record[PRESENCE] + record[FREQUENCY] * times
    x[seen] = values - torch.where(times > 0, additive, 0.0)


def sample(
    logits: torch.Tensor,
    records: torch.Tensor,
    filters: Filters,
    counts: torch.Tensor,
    last_tokens: torch.Tensor,
    results: torch.Tensor,
    workspace: tuple[torch.Tensor, ...],
) -> None:
    """Choose one token a record: the largest logit, or a draw.

    A draw divides by the temperature, drops what min_p, top_k and top_p drop (tokens as likely as the
    last one kept are kept), and inverts the cumulative distribution in vocabulary order. It depends on
    its own row alone.

    Args:
        logits: row SOURCE of a record is the record's; left as they are.
        filters: of the last records; those before them keep every token.
        counts: updated for the records that are penalised.
        last_tokens: (more than seats,) int64; the seat's entry is written.
        results: (rows, 2) int32; row TARGET is written: the token, and the bits of the largest logit
            as float32. That one is finite exactly if the token means something: a row with NaN or
            plus infinity, or with nothing but minus infinity, gets some valid token.
        workspace: what `sampling_workspace` made for as many rows or more; nobody else's meanwhile.
    """
    lists = records.tolist()
    sources = [record[SOURCE] for record in lists]
    # A batch that wants all rows as they lie is the usual one, and is not copied.
    is_whole = sources == list(range(len(sources)))
    logits = logits[: len(sources)] if is_whole else logits[sources]
    peaks, tokens = _largest(logits)
    temperatures = records.view(torch.float32)[:, TEMPERATURE].tolist()
    random = [row for row, temperature in enumerate(temperatures) if temperature > 0.0]
    if random:
        is_all = len(random) == len(sources)
        drawn = _draw(logits if is_all else logits[random], records if is_all else records[random])
        tokens[random] = drawn
    seats, targets = records[:, SEAT], records[:, TARGET]
    last_tokens.index_copy_(0, seats.long(), tokens)
    made = torch.stack([tokens.int(), peaks.float().view(torch.int32)], dim=1)
    results.index_copy_(0, targets.long(), made)
    penalized = [row for row, record in enumerate(lists) if record[IS_PENALIZED]]
    if penalized:
        counts[seats[penalized].long(), tokens[penalized]] += 1


def _largest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logit of each row, NaN if there is one, and its first token."""
    if logits.dtype != torch.float32 or logits.device.type != "cpu":
        peaks, tokens = logits.max(dim=-1)
        return peaks, tokens
    # torch looks for a row's largest value together with its place one element after another: 44 us
    # for 49,152 of them, where these two take 8.
    return logits.amax(dim=-1), torch.from_numpy(logits.numpy().argmax(axis=-1))


def _draw(logits: torch.Tensor, records: torch.Tensor) -> torch.Tensor:
    numbers, doubles = records.view(torch.float32), records.view(torch.float64)
    scores = logits.float()
    # With the largest score at 0, no temperature makes exp() overflow.
    scores = (scores - scores.amax(dim=-1, keepdim=True)).div_(numbers[:, TEMPERATURE, None])
    log_min_p = numbers[:, LOG_MIN_P]
    if max(log_min_p.tolist()) > -torch.inf:
        scores.masked_fill_(scores < log_min_p[:, None], -torch.inf)
    settings = zip(records[:, TOP_K].tolist(), doubles[:, TOP_P].tolist(), strict=True)
    truncated = [row for row, (top_k, top_p) in enumerate(settings) if top_k or top_p < 1.0]
    if truncated:
        _truncate(scores, truncated, records)
    # float32 would lose the rare tokens of a large vocabulary in the sum.
    sums = scores.exp_().cumsum(dim=-1, dtype=torch.float64)
    spots = doubles[:, UNIFORM] * sums[:, -1]
    return torch.searchsorted(sums, spots[:, None], right=True)[:, 0].clamp_(max=scores.shape[1] - 1)


def _truncate(scores: torch.Tensor, rows: list[int], records: torch.Tensor) -> None:
    """Set what top_k and top_p drop to minus infinity, in place: one threshold a row."""
    vocab_size = scores.shape[1]
    part, records = scores[rows], records[rows]
    limits = records[:, TOP_K].masked_fill(records[:, TOP_K] == 0, vocab_size)
    top_p = records.view(torch.float64)[:, TOP_P]
    totals = part.exp().sum(dim=-1, dtype=torch.float64)
    width = min(vocab_size, max([_CANDIDATES, *(k for k in limits.tolist() if k < vocab_size)]))
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
