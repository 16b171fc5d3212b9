"""From logits to tokens, for every row of a step at once, without waiting for the device.

The order is vLLM's: log probabilities come from the raw logits; then logit_bias, min_tokens and the
penalties; then argmax, or temperature, min_p, top_k, top_p and one draw. Rows that do not ask for a
feature do not pay for it.

The next step may be launched before the host knows this one's tokens. What it needs of them stays on
the device, by seat: the newest token, and the counts of penalties.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.messages import SamplingParams, TokenLogprobs
from engine.model.sampling_logprobs import details, parse, raw_logprobs
from engine.model.sampling_seats import Records, SeatTable, is_penalized
from engine.model.sampling_state import SeatState
from engine.model.sampling_transfer import Download, Transfer
from kernels.backend import Kernels
from kernels.sampling_record import RECORD_WORDS


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What one row of logits is to become.

    Attributes:
        seat: the sequence's place in these tables; names its state on the device.
        num_outputs: output tokens before this one, those in flight included.
        history: prompt and output ids if the seat was given to the sequence since its last sampled
            row: the seat's state is set anew. None otherwise.
    """

    seat: int
    params: SamplingParams
    seed: int
    num_outputs: int
    history: tuple[Sequence[int], Sequence[int]] | None


@dataclass(frozen=True, slots=True)
class Sampled:
    """What one row of logits became.

    Attributes:
        error: why the token means nothing: the row's logits were not finite. None if it is sound.
    """

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None


class Pending:
    """The tokens of a step that has been launched."""

    def __init__(self, download: Download, wanted: dict[int, int]) -> None:
        self._download = download
        self._wanted = wanted

    def wait(self) -> list[Sampled]:
        """One result a row, once the device has finished this step; later ones may still run."""
        results, all_details = self._download.read()
        tokens = results[:, 0].tolist()
        sampled = [Sampled(token) for token in tokens]
        for (row, num_wanted), row_details in zip(self._wanted.items(), all_details, strict=True):
            sampled[row] = Sampled(tokens[row], parse(row_details, num_wanted))
        # NaN or plus infinity are the largest logit of their row; minus infinity is if it is alone.
        peaks = results[:, 1].view(np.float32)
        for row in np.flatnonzero(~np.isfinite(peaks)).tolist():
            found = "all are minus infinity" if peaks[row] < 0 else "NaN or infinity is among them"
            sampled[row] = Sampled(tokens[row], error=f"the model's logits are not finite: {found}")
        return sampled


class Sampler:
    """Chooses one token for each row of logits.

    Steps follow one another on one stream of the device.

    Args:
        eos_token_ids: the model's own stop tokens.
        device: where the logits are.
        num_seats: seats are 0 .. num_seats - 1; a step has one row a seat at most.
        kernels: the implementation for that device.

    Attributes:
        last_tokens: (num_seats + 1,) int64 on the device, the newest token of each seat; the last entry
            is nobody's. Never moves.
    """

    def __init__(
        self,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        device: torch.device,
        num_seats: int,
        kernels: Kernels,
    ) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._device = device
        self._kernels = kernels
        self._seats = SeatTable(num_seats, vocab_size, eos_token_ids)
        self._state = SeatState(num_seats, vocab_size, device)
        self._transfer = Transfer(num_seats, device, kernels)
        self._workspace = kernels.sampling_workspace(num_seats, vocab_size, device)
        # Logits after biases and penalties: made when the first request asks, for as many rows as ask.
        self._adjusted = torch.empty((0, vocab_size), dtype=torch.float32, device=device)
        self.last_tokens = torch.zeros(num_seats + 1, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def launch(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> Pending:
        """Enqueue the choice of one token a row and its way to the host. Never waits for the device.

        A row with NaN or infinity reports an error and leaves the others as they are.

        Args:
            logits: (rows or more, vocab), any float type; not changed, and free to be overwritten by
                what is enqueued later.

        Raises:
            torch.OutOfMemoryError: a table for penalties or log probabilities did not fit. The seats
                of these rows need their history with the next row.
        """
        if not rows:  # nothing to choose; the step is still to be waited for
            self._transfer.upload([])
            return Pending(self._transfer.download(0, None), {})
        for row in rows:
            if row.history is not None:
                self._assign(row, *row.history)
        seats = np.array([row.seat for row in rows], np.int64)
        records = self._seats.records(seats, np.array([row.num_outputs for row in rows], np.int64))
        wanted = {index: row.params.logprobs for index, row in enumerate(rows)}
        counts = {index: count for index, count in wanted.items() if count is not None}
        places = np.array([*counts, *(rows[index].seat for index in counts)], np.int32)
        words = self._transfer.upload([records.words, places, *self._state.uploads()])
        end = records.words.size
        raw = None
        if counts:
            indices, seat_words = words[end : end + places.size].view(2, -1)
            raw = raw_logprobs(logits, indices, seat_words, max(counts.values()))
        self._state.store(words[end + places.size :])
        self._choose(logits, records, words[:end].view(-1, RECORD_WORDS))
        found = None if raw is None else details(logits, raw, self.last_tokens)
        return Pending(self._transfer.download(len(rows), found), counts)

    def warm_up(self, dtype: torch.dtype) -> None:
        """Run every kernel once on logits of this type, so that no step waits for a compilation."""
        sampler = Sampler(self._vocab_size, self._eos_token_ids, self._device, 3, self._kernels)
        logits = torch.zeros((3, self._vocab_size), dtype=dtype, device=self._device)
        params = (
            SamplingParams(),
            SamplingParams(top_k=2, top_p=0.5),
            SamplingParams(top_k=2, top_p=0.5, logit_bias=((0, 1.0),), presence_penalty=1.0),
        )
        rows = [SampleRow(seat, one, 0, 0, ((0,), ())) for seat, one in enumerate(params)]
        sampler.launch(logits, rows).wait()

    def _assign(self, row: SampleRow, prompt: Sequence[int], output: Sequence[int]) -> None:
        edits = self._seats.assign(row.seat, row.params, row.seed)
        if len(edits):
            self._state.set_edits(row.seat, edits)
        if is_penalized(row.params):
            self._state.set_history(row.seat, prompt, output)

    def _choose(self, logits: torch.Tensor, records: Records, words: torch.Tensor) -> None:
        state, results, split = self._state, self._transfer.results, records.num_raw
        raw_words, adjusted_words = words[:split], words[split:]
        num_adjusted = len(adjusted_words)
        if num_adjusted > len(self._adjusted):
            num_rows = min(1 << (num_adjusted - 1).bit_length(), len(self.last_tokens) - 1)
            self._adjusted = torch.empty(0)  # the old buffer and the new one need not fit together
            self._adjusted = torch.empty(
                (num_rows, self._vocab_size), dtype=torch.float32, device=self._device
            )
        if split:
            self._kernels.sample(
                logits, raw_words, records.raw, state.counts, self.last_tokens, results, self._workspace
            )
        if num_adjusted:
            adjusted = self._kernels.adjust_logits(
                logits, adjusted_words, state.edits, state.counts, self._adjusted[:num_adjusted]
            )
            self._kernels.sample(
                adjusted,
                adjusted_words,
                records.adjusted,
                state.counts,
                self.last_tokens,
                results,
                self._workspace,
            )
