"""The activation arena: one virtual tensor that holds a forward pass.

Every buffer has a planned offset that depends only on the step's size, so the bytes of a step are
known before it starts (eLLM reserves KV and activations of an iteration together). Small steps lie
at the low end; the tail is backed as far as the largest recent step needed, and lent to the KV
cache when that is short.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import torch

from engine.memory.chunks import ChunkPool
from engine.memory.virtual_tensor import VirtualTensor

SMALLEST_PIECE = 16  # tokens; an elastic engine cuts a prompt this small before it gives up
_ALIGN = 256  # widest vector access of a kernel, and what tensor-memory descriptors ask for

_REMEMBERED_STEPS = 8  # more than can be in flight


@dataclass(frozen=True, slots=True)
class BufferSpec:
    """One buffer of the forward pass.

    Attributes:
        width: elements a token, a row of logits, or in all.
        per: what the first dimension counts; `step` is one line whatever the step's size.
        stage: buffers of different stages share memory; None lives through the whole pass.
    """

    name: str
    width: int
    dtype: torch.dtype
    per: Literal["token", "row", "step"]
    stage: str | None = None

    def count(self, num_tokens: int, num_rows: int) -> int:
        """Length of the first dimension in a step of that size."""
        return {"token": num_tokens, "row": num_rows, "step": 1}[self.per]

    def nbytes(self, num_tokens: int, num_rows: int) -> int:
        """Bytes of the buffer in a step of that size, aligned."""
        nbytes = self.count(num_tokens, num_rows) * self.width * self.dtype.itemsize
        return -(-nbytes // _ALIGN) * _ALIGN


def activation_bytes(specs: Sequence[BufferSpec], num_tokens: int, num_rows: int) -> int:
    """Exact bytes of one forward pass over `num_tokens` tokens with `num_rows` rows of logits."""
    return max(
        (offset + spec.nbytes(num_tokens, num_rows) for spec, offset in _layout(specs, num_tokens, num_rows)),
        default=0,
    )


def _layout(specs: Sequence[BufferSpec], num_tokens: int, num_rows: int) -> Iterator[tuple[BufferSpec, int]]:
    """Each buffer with its offset: the lasting ones first, the stages over one another behind them."""
    base = 0
    for spec in specs:
        if spec.stage is None:
            yield spec, base
            base += spec.nbytes(num_tokens, num_rows)
    ends: dict[str, int] = {}
    for spec in specs:
        if spec.stage is not None:
            offset = ends.get(spec.stage, base)
            yield spec, offset
            ends[spec.stage] = offset + spec.nbytes(num_tokens, num_rows)


class StepBuffers:
    """The buffers of steps over one range of memory, each at its planned offset.

    Args:
        specs: the model's buffers.
        memory: the range, as uint8; called once, when the first step is cut.
    """

    def __init__(self, specs: Sequence[BufferSpec], memory: Callable[[], torch.Tensor]) -> None:
        self._specs = tuple(specs)
        self._memory = memory
        self._bytes: torch.Tensor | None = None
        self._newest: tuple[tuple[int, int], dict[str, torch.Tensor]] | None = None

    def buffers(self, num_tokens: int, num_rows: int) -> Mapping[str, torch.Tensor]:
        """The buffers of a step that has been reserved, each (tokens or rows, width).

        Content is undefined. The same size gives the same addresses, always.
        """
        size = (num_tokens, num_rows)
        if self._newest is None or self._newest[0] != size:
            self._newest = (
                size,
                {spec.name: self._cut(spec, offset, size) for spec, offset in _layout(self._specs, *size)},
            )
        return self._newest[1]

    def _cut(self, spec: BufferSpec, offset: int, size: tuple[int, int]) -> torch.Tensor:
        if self._bytes is None:
            self._bytes = self._memory()
        count = spec.count(*size)
        nbytes = count * spec.width * spec.dtype.itemsize
        return self._bytes[offset : offset + nbytes].view(spec.dtype).view(count, spec.width)


class ActivationArena:
    """A virtual tensor cut into the buffers of a step.

    Args:
        chunks: the pool.
        specs: the model's buffers.
        max_tokens, max_rows: the largest step.
        padded_sizes: tokens and rows that a step may be filled up to, in rising order.

    Attributes:
        chunks_for: (tokens, rows of logits) -> chunks a step of that size needs.
        buffers: `StepBuffers.buffers` over the arena.
    """

    def __init__(
        self,
        chunks: ChunkPool,
        specs: Sequence[BufferSpec],
        max_tokens: int,
        max_rows: int,
        padded_sizes: Sequence[int] = (),
    ) -> None:
        self._padded_sizes = tuple(padded_sizes)
        self._specs = tuple(specs)
        self._chunk_bytes = chunks.vm.chunk_bytes
        # A draft asks once for each sequence it adds, and the next step asks for the same sizes again:
        # with 256 sequences, remembering takes scheduling a step from 3.7 to 0.9 ms (CPU, 2.6 GHz).
        self.chunks_for = lru_cache(maxsize=4096)(self._count_chunks)
        self.max_chunks = max(1, self.chunks_for(max_tokens, max_rows))
        self.tensor = VirtualTensor(chunks, self.max_chunks, "activation")
        self.buffers = StepBuffers(specs, partial(self.tensor.view, torch.uint8)).buffers
        self._uses: deque[tuple[int, int]] = deque(maxlen=_REMEMBERED_STEPS)

    @property
    def num_backed(self) -> int:
        """Chunks behind the arena now, from its low end on."""
        return self.tensor.num_backed

    def is_backed(self, num_tokens: int, num_rows: int) -> bool:
        """Whether a step of that size can run on what is behind the arena now."""
        return self.chunks_for(num_tokens, num_rows) <= self.num_backed

    def missing_rows(self, num_chunks: int) -> list[int]:
        """Rows to back before the arena has `num_chunks` chunks."""
        return list(range(self.num_backed, num_chunks))

    def used(self, step: int, num_chunks: int) -> None:
        """A step that computes in the lowest `num_chunks` chunks has been launched."""
        self._uses.append((step, num_chunks))

    def shrink(self, num_chunks: int) -> None:
        """Keep the lowest `num_chunks` chunks; the rest becomes free once no step computes in it."""
        last = max((step for step, used in self._uses if used > num_chunks), default=0)
        self.tensor.drop(range(num_chunks, self.num_backed), last)

    def _count_chunks(self, num_tokens: int, num_rows: int) -> int:
        size = self._padded(num_tokens), self._padded(num_rows)
        return -(-activation_bytes(self._specs, *size) // self._chunk_bytes)

    def _padded(self, count: int) -> int:
        at = bisect_left(self._padded_sizes, count)
        return self._padded_sizes[at] if count and at < len(self._padded_sizes) else count
