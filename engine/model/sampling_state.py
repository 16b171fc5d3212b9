"""What each seat's sampling keeps on the device: biases and bans, and how often it has said a token.

Both tables are made when the first request asks for them. The counts are as large as the logits of a
full step: the kernels add to them as they choose, so that a penalty knows of tokens in flight.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from kernels.sampling_record import PROMPT_FLAG

_FEWEST_EDITS = 16  # entries a seat; room for more is made when a request has them

Int32Array = npt.NDArray[np.int32]


class SeatState:
    """The tables, and what is on its way to them.

    Attributes:
        edits: (num_seats, entries, 2) int32 or (0, entries, 2); see `kernels.sampling_reference`.
        counts: (num_seats, vocab) int32 or (0,).
    """

    def __init__(self, num_seats: int, vocab_size: int, device: torch.device) -> None:
        self._num_seats = num_seats
        self._vocab_size = vocab_size
        self._device = device
        self.edits = torch.empty((0, _FEWEST_EDITS, 2), dtype=torch.int32, device=device)
        self.counts = torch.empty(0, dtype=torch.int32, device=device)
        self._new_edits: list[tuple[int, Int32Array]] = []
        self._new_histories: list[tuple[int, Int32Array, Int32Array]] = []

    def set_edits(self, seat: int, edits: Int32Array) -> None:
        """Replace the seat's biases and bans, (entries, 2), at the next `store`."""
        num_entries = self.edits.shape[1]
        if len(edits) > num_entries or not len(self.edits):
            num_entries = max(num_entries, 1 << (len(edits) - 1).bit_length())
            larger = torch.zeros((self._num_seats, num_entries, 2), dtype=torch.int32, device=self._device)
            larger[: len(self.edits), : self.edits.shape[1]] = self.edits
            self.edits = larger
        self._new_edits.append((seat, edits))

    def set_history(self, seat: int, prompt: Sequence[int], output: Sequence[int]) -> None:
        """Count the seat's tokens anew at the next `store`."""
        if not len(self.counts):
            shape = (self._num_seats, self._vocab_size)
            self.counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
        self._new_histories.append((seat, self._ids(prompt), self._ids(output)))

    def uploads(self) -> list[Int32Array]:
        """What `store` wants on the device, in its order."""
        histories = [ids for _, prompt, output in self._new_histories for ids in (prompt, output)]
        return [edits for _, edits in self._new_edits] + histories

    def store(self, words: torch.Tensor) -> None:
        """Enqueue the changes; `words` are the uploads one after another, on the device."""
        for seat, edits in self._new_edits:
            now, words = words[: edits.size], words[edits.size :]
            self.edits[seat, : len(edits)] = now.view(-1, 2)
        for seat, prompt, output in self._new_histories:
            now, words = words[: prompt.size + output.size].long(), words[prompt.size + output.size :]
            counts = self.counts[seat].zero_()
            counts.index_fill_(0, now[: prompt.size], PROMPT_FLAG)
            counts.scatter_add_(0, now[prompt.size :], torch.ones_like(now[prompt.size :], dtype=torch.int32))
        self._new_edits, self._new_histories = [], []

    def _ids(self, tokens: Sequence[int]) -> Int32Array:
        ids = np.array(tokens, np.int64)
        return ids[(ids >= 0) & (ids < self._vocab_size)].astype(np.int32)
