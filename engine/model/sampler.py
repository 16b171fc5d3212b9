"""From logits to tokens, for every row of a step at once.

The order is vLLM's: log probabilities come from the raw logits; then logit_bias, min_tokens and the
penalties; then argmax, or temperature, min_p, top_k, top_p and one draw. Rows that do not ask for a
feature do not pay for it. The host waits for the device once, at the end; top_k and top_p make it wait
once more.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch

from engine.messages import TokenLogprobs
from engine.model.draw import draw, uniform
from engine.model.penalties import adjust
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Sampled:
    """What one row of logits became.

    Attributes:
        error: why the token means nothing: the row's logits were not finite. None if it is sound.
    """

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class _RawLogprobs:
    """Log probabilities of the rows that want them, before anything changes the logits."""

    rows: list[int]
    log_softmax: torch.Tensor
    num_top: int


class Sampler:
    """Chooses one token for each row of logits.

    Args:
        eos_token_ids: the model's own stop tokens.
        device: where the logits are.
    """

    def __init__(self, vocab_size: int, eos_token_ids: tuple[int, ...], device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._device = device

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, sequences: Rows[Sequence]) -> list[Sampled]:
        """One token for each sequence, whose `output_token_ids` do not hold it yet.

        A row with NaN or infinity reports an error and leaves the others as they are.

        Args:
            logits: (rows, vocab), any float type; not changed.
        """
        if not sequences:
            return []
        raw = self._raw_logprobs(logits, sequences)
        logits = adjust(logits, sequences, self._eos_token_ids)
        peaks, tokens = logits.max(dim=-1)
        random = [row for row, seq in enumerate(sequences) if not _is_greedy(seq)]
        if random:
            chosen = [sequences[row] for row in random]
            drawn = draw(
                logits if len(random) == len(sequences) else logits[random],
                [seq.sampling for seq in chosen],
                [uniform(seq.seed, len(seq.output_token_ids)) for seq in chosen],
            )
            tokens[random] = drawn
        return self._results(sequences, tokens, peaks, raw)

    def _raw_logprobs(self, logits: torch.Tensor, sequences: Rows[Sequence]) -> _RawLogprobs | None:
        wanted = {row: seq.sampling.logprobs for row, seq in enumerate(sequences)}
        counts = {row: count for row, count in wanted.items() if count is not None}
        if not counts:
            return None
        rows = list(counts)
        log_softmax = torch.log_softmax(logits[rows].float(), dim=-1)
        return _RawLogprobs(rows, log_softmax, min(max(counts.values()), self._vocab_size))

    def _results(
        self,
        sequences: Rows[Sequence],
        tokens: torch.Tensor,
        peaks: torch.Tensor,
        raw: _RawLogprobs | None,
    ) -> list[Sampled]:
        # float64 holds token ids exactly, so that one transfer brings everything.
        table = [tokens.double()[:, None], peaks.double()[:, None]]
        if raw is None:
            return [_sampled(row) for row in torch.cat(table, dim=1).tolist()]
        details = tokens.new_zeros((len(sequences), 1 + 2 * raw.num_top), dtype=torch.float64)
        chosen = raw.log_softmax.gather(1, tokens[raw.rows][:, None])
        top = raw.log_softmax.topk(raw.num_top, dim=-1)
        details[raw.rows] = torch.cat([chosen.double(), top.values.double(), top.indices.double()], dim=1)
        host = torch.cat([*table, details], dim=1).tolist()
        return [
            _sampled(row, seq.sampling.logprobs, raw.num_top)
            for row, seq in zip(host, sequences, strict=True)
        ]


def _is_greedy(seq: Sequence) -> bool:
    return seq.sampling.temperature == 0.0 or seq.sampling.top_k == 1


def _sampled(row: list[float], num_wanted: int | None = None, num_top: int = 0) -> Sampled:
    token_id, peak = int(row[0]), row[1]
    # The largest logit is NaN or infinite if any is NaN or plus infinity, or if all are minus infinity.
    if not abs(peak) < float("inf"):
        return Sampled(token_id, error=f"the model's logits are not finite (their maximum is {peak})")
    if num_wanted is None:
        return Sampled(token_id)
    values, ids = row[3 : 3 + num_top], row[3 + num_top :]
    top = tuple((int(token), value) for token, value in zip(ids, values, strict=True))
    return Sampled(token_id, TokenLogprobs(row[2], top[:num_wanted]))
