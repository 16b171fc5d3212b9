"""Words between the host and the device without a wait: pinned memory in rotation, an event a step.

A step owns one set of host buffers from its upload until its results have been read. There are more
sets than steps in flight; if one comes round with results that nobody has read, they are read first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from kernels.backend import Kernels

_NUM_SETS = 4  # steps in flight are two
_FIRST_WORDS = 32 * 1024  # of an upload: 256 records are 4,096; histories of penalties need more

Int32Array = npt.NDArray[np.int32]


class Download:
    """Results of one step on their way to the host."""

    def __init__(
        self, results: torch.Tensor, details: torch.Tensor | None, event: torch.cuda.Event | None
    ) -> None:
        self._results = results
        self._details = details
        self._event = event
        self._read: tuple[Int32Array, list[list[float]]] | None = None

    def read(self) -> tuple[Int32Array, list[list[float]]]:
        """Results (rows, 2) and the rows of details, once the device has made them."""
        if self._read is None:
            if self._event is not None:
                self._event.synchronize()
            details = [] if self._details is None else self._details.tolist()
            self._read = (self._results.numpy().copy(), details)
            self._details = None
        return self._read


class _HostSet:
    """The host buffers of one step, and the event after which they may be used again."""

    def __init__(self, num_rows: int, is_cuda: bool) -> None:
        self.results = torch.empty((num_rows, 2), dtype=torch.int32, pin_memory=is_cuda)
        self.event = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]
        self.download: Download | None = None
        self._is_cuda = is_cuda
        self._reserve(_FIRST_WORDS)

    def pack(self, parts: Sequence[Int32Array]) -> torch.Tensor:
        """The parts one after another in pinned memory."""
        total = sum(part.size for part in parts)
        if total > len(self._array):
            self._reserve(1 << (total - 1).bit_length())
        start = 0
        for part in parts:
            self._array[start : start + part.size] = part.ravel()
            start += part.size
        return self._words[:total]

    def _reserve(self, num_words: int) -> None:
        self._words = torch.empty(num_words, dtype=torch.int32, pin_memory=self._is_cuda)
        self._array: Int32Array = self._words.numpy()


class Transfer:
    """One upload and one download a step, all on the current stream.

    Args:
        num_rows: rows of results at most.
        kernels: the implementation for that device.

    Attributes:
        results: (num_rows, 2) int32 on the device, for the step that is being launched. Kernels and
            copies of all steps follow one another on one stream, so that one buffer serves them.
    """

    def __init__(self, num_rows: int, device: torch.device, kernels: Kernels) -> None:
        self._is_cuda = device.type == "cuda"
        self._kernels = kernels
        self._device = device
        self._sets = [_HostSet(num_rows, self._is_cuda) for _ in range(_NUM_SETS)]
        self._current = 0
        self._words = torch.empty(_FIRST_WORDS, dtype=torch.int32, device=device)
        self.results = torch.empty((num_rows, 2), dtype=torch.int32, device=device)

    def upload(self, parts: Sequence[Int32Array]) -> torch.Tensor:
        """Begin a step: the parts one after another on the device, until the next step's upload."""
        self._current = (self._current + 1) % _NUM_SETS
        buffers = self._sets[self._current]
        if buffers.download is not None:
            buffers.download.read()
        words = buffers.pack(parts)
        if not self._is_cuda:
            return words
        if len(words) > len(self._words):
            self._words = torch.empty(
                1 << (len(words) - 1).bit_length(), dtype=torch.int32, device=self._device
            )
        return self._kernels.copy_words(words, self._words[: len(words)])

    def download(self, num_rows: int, details: torch.Tensor | None) -> Download:
        """End a step: the first rows of `results`, and float64 details, set out for the host."""
        buffers = self._sets[self._current]
        host = self._kernels.copy_words(self.results[:num_rows], buffers.results[:num_rows])
        if details is not None and self._is_cuda:
            pinned = torch.empty(details.shape, dtype=details.dtype, pin_memory=True)
            self._kernels.copy_words(details.view(torch.int32), pinned.view(torch.int32))
            details = pinned
        if buffers.event is not None:
            buffers.event.record()
        buffers.download = Download(host, details, buffers.event)
        if not self._is_cuda:
            buffers.download.read()
        return buffers.download
