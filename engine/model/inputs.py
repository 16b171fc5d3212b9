"""What a step computes, as index tensors on the device: one packed transfer a step.

The host writes the plan into pinned memory, a kernel takes it to the device, in the order of the
stream, and the tensors of a `Batch` are views of what arrived. The same counts give the same
addresses, so a CUDA graph captured over the views of a size reads every later step of that size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from engine.messages import Piece, StepPlan
from engine.model.decoder import Batch
from engine.model.graphs import MAX_PIECES, GraphShape
from kernels.backend import Kernels

Columns = dict[str, npt.NDArray[np.int64]]

_ALIGN = 16
_NUM_STAGES = 3  # two steps in flight and one being written

_COLUMNS: tuple[tuple[str, torch.dtype, str], ...] = (
    ("input_ids", torch.int64, "tokens"),
    ("positions", torch.int64, "tokens"),
    ("token_first_rows", torch.int64, "tokens"),
    ("pending_seats", torch.int64, "decodes"),
    ("first_rows", torch.int64, "sequences"),
    ("shared_first_rows", torch.int64, "sequences"),
    ("sample_indices", torch.int64, "rows"),
    ("context_lens", torch.int32, "sequences"),
    ("shared_lens", torch.int32, "sequences"),
    ("query_starts", torch.int32, "starts"),
    ("is_pending", torch.bool, "decodes"),
)


class Slots(Protocol):
    """The part of `KvCache` that says where a sequence's KV begins."""

    def first_row(self, slot: int) -> int: ...


class Counts(NamedTuple):
    """How many of everything a step has; padding included."""

    tokens: int
    decodes: int
    sequences: int
    rows: int

    @property
    def starts(self) -> int:
        """Entries of `query_starts`."""
        return self.sequences - self.decodes + 1


class StepLayout(NamedTuple):
    """What is known of a step before its bytes are looked at: the same on every rank.

    Attributes:
        max_query_len: tokens of the longest piece of a prompt.
        has_pending: some token is still only on the device of the first rank.
    """

    counts: Counts
    max_query_len: int
    has_pending: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the step's index tensors, packed."""
        return _layout(self.counts)[1]


class StepInputs:
    """The staging of steps for one device: written or loaded, taken to the device, cut into a `Batch`.

    Args:
        device: where the batch goes. On a CPU nothing is copied.
        slots: knows the KV row of a slot.
        max_tokens, max_sequences: the largest step.
        kernels: the implementation for that device.
    """

    def __init__(
        self, device: torch.device, slots: Slots, max_tokens: int, max_sequences: int, kernels: Kernels
    ) -> None:
        self._slots = slots
        self._kernels = kernels
        # The most of each column in any step: a graph has places for MAX_PIECES pieces beside its decodes,
        # and a step without decodes as many pieces as there may be sequences.
        rows = max_sequences + MAX_PIECES
        nbytes = _layout(Counts(max_tokens, max_sequences, rows + max_sequences, rows))[1]
        on_gpu = device.type == "cuda"
        self._stages = [
            torch.empty(nbytes, dtype=torch.uint8, pin_memory=on_gpu)
            for _ in range(_NUM_STAGES if on_gpu else 1)
        ]
        self._copied = [torch.Event(device) for _ in self._stages] if on_gpu else []
        self._device_bytes = torch.empty(nbytes, dtype=torch.uint8, device=device) if on_gpu else None
        self._turn = 0

    def put(self, plan: StepPlan, shape: GraphShape | None = None) -> Batch:
        """Write a plan, take it to the device, and cut it.

        Args:
            shape: what to fill the plan up to. Padding reads and writes the guard row, and its results
                mean nothing: rows of logits beyond the plan's own.
        """
        layout = self.write(plan, shape)
        self.upload(layout)
        return self.batch(layout)

    def write(self, plan: StepPlan, shape: GraphShape | None = None) -> StepLayout:
        """Write a plan into pinned memory; `shape` as in `put`."""
        counts = _counts(plan, shape)
        has_pending = self._write(_arrays(self._next_stage(), counts), plan, counts)
        longest = max((len(piece.token_ids) for piece in plan.pieces[plan.num_decodes :]), default=0)
        is_padded = counts.tokens > plan.num_tokens
        return StepLayout(counts, counts.tokens - counts.decodes if is_padded else longest, has_pending)

    def written(self, layout: StepLayout) -> memoryview:
        """The bytes of the step that was written last, for other ranks to `load`."""
        return self._stages[self._turn].numpy().data[: layout.nbytes]

    def load(self, layout: StepLayout, packed: bytes) -> None:
        """Take over the bytes of a step that another rank has written."""
        self._next_stage().numpy()[: layout.nbytes] = np.frombuffer(packed, np.uint8)

    def upload(self, layout: StepLayout) -> None:
        """Take what was written or loaded to the device, where steps of the same counts have it."""
        if self._device_bytes is not None:
            stage = self._stages[self._turn]
            source, target = stage[: layout.nbytes], self._device_bytes[: layout.nbytes]
            self._kernels.copy_words(source.view(torch.int32), target.view(torch.int32))
            self._copied[self._turn].record()

    def _next_stage(self) -> torch.Tensor:
        """Memory for the next step, once the one that had it is on the device."""
        self._turn = (self._turn + 1) % len(self._stages)
        if self._copied:
            self._copied[self._turn].synchronize()
        return self._stages[self._turn]

    def _tensors(self, counts: Counts) -> dict[str, torch.Tensor]:
        source = self._stages[self._turn] if self._device_bytes is None else self._device_bytes
        offsets = _layout(counts)[0]
        return {
            name: source[offsets[name] : offsets[name] + getattr(counts, of) * dtype.itemsize].view(dtype)
            for name, dtype, of in _COLUMNS
        }

    def _write(self, to: Columns, plan: StepPlan, counts: Counts) -> bool:
        """Fill the columns in; whether a token is pending."""
        decodes, prefills = plan.pieces[: plan.num_decodes], plan.pieces[plan.num_decodes :]
        if counts.tokens > plan.num_tokens or counts.sequences > len(plan.pieces):
            _write_padding(to)
        sampled = self._write_decodes(to, decodes) + self._write_prefills(to, prefills, counts.decodes)
        to["sample_indices"][: len(sampled)] = sampled
        # Not only where tokens or pieces are filled up: a piece that samples nothing leaves a row over.
        to["sample_indices"][len(sampled) :] = 0
        return bool(to["is_pending"][: len(decodes)].any())

    def _write_decodes(self, to: Columns, pieces: Sequence[Piece]) -> list[int]:
        """Fill in the decodes; the tokens that sample."""
        count = len(pieces)
        ids = np.array([piece.token_ids[0] for piece in pieces], dtype=np.int64)
        starts = np.array([piece.start for piece in pieces], dtype=np.int64)
        rows = [self._slots.first_row(piece.slot) for piece in pieces]
        to["is_pending"][:count] = ids < 0
        to["input_ids"][:count] = np.maximum(ids, 0)
        to["positions"][:count] = starts
        to["context_lens"][:count] = starts + 1
        to["token_first_rows"][:count] = rows
        to["first_rows"][:count] = rows
        to["pending_seats"][:count] = [piece.seat for piece in pieces]
        self._write_shared(to, pieces, 0)
        return [index for index, piece in enumerate(pieces) if piece.samples]

    def _write_prefills(self, to: Columns, pieces: Sequence[Piece], num_decodes: int) -> list[int]:
        """Fill in pieces of prompts behind the places for decodes; the tokens that sample."""
        sampled, at = [], num_decodes
        for index, piece in enumerate(pieces):
            end = at + len(piece.token_ids)
            row = self._slots.first_row(piece.slot)
            to["input_ids"][at:end] = piece.token_ids
            to["positions"][at:end] = np.arange(piece.start, piece.start + end - at)
            to["token_first_rows"][at:end] = row
            to["first_rows"][num_decodes + index] = row
            to["context_lens"][num_decodes + index] = piece.start + end - at
            to["query_starts"][index] = at - num_decodes
            if piece.samples:
                sampled.append(end - 1)
            at = end
        to["query_starts"][len(pieces) :] = at - num_decodes  # padding has no queries
        self._write_shared(to, pieces, num_decodes)
        return sampled

    def _write_shared(self, to: Columns, pieces: Sequence[Piece], at: int) -> None:
        lens = [piece.shared_tokens for piece in pieces]
        to["shared_lens"][at : at + len(pieces)] = lens
        if any(lens):
            rows = [self._slots.first_row(piece.shared_slot) for piece in pieces]
            to["shared_first_rows"][at : at + len(pieces)] = rows
        else:
            to["shared_first_rows"][at : at + len(pieces)] = 0

    def batch(self, layout: StepLayout) -> Batch:
        """The tensors of a step, views of what arrived."""
        counts, tensors = layout.counts, self._tensors(layout.counts)
        decodes = counts.decodes
        first_rows, context_lens = tensors["first_rows"], tensors["context_lens"]
        shared_rows, shared_lens = tensors["shared_first_rows"], tensors["shared_lens"]
        return Batch(
            input_ids=tensors["input_ids"],
            pending_seats=tensors["pending_seats"],
            is_pending=tensors["is_pending"],
            positions=tensors["positions"],
            token_first_rows=tensors["token_first_rows"],
            num_decodes=decodes,
            decode_first_rows=first_rows[:decodes],
            decode_shared_first_rows=shared_rows[:decodes],
            decode_shared_lens=shared_lens[:decodes],
            decode_context_lens=context_lens[:decodes],
            query_starts=tensors["query_starts"],
            prefill_first_rows=first_rows[decodes:],
            prefill_shared_first_rows=shared_rows[decodes:],
            prefill_shared_lens=shared_lens[decodes:],
            prefill_context_lens=context_lens[decodes:],
            max_query_len=layout.max_query_len,
            sample_indices=None if counts.rows == counts.tokens else tensors["sample_indices"],
        )


def _counts(plan: StepPlan, shape: GraphShape | None) -> Counts:
    if shape is not None:
        return Counts(shape.tokens, shape.decodes, shape.decodes + shape.pieces, shape.rows)
    return Counts(plan.num_tokens, plan.num_decodes, len(plan.pieces), plan.num_rows)


@lru_cache(maxsize=1024)
def _layout(counts: Counts) -> tuple[dict[str, int], int]:
    """Where each column begins, and the bytes of all of them."""
    offsets, end = {}, 0
    for name, dtype, of in _COLUMNS:
        offsets[name] = end
        end += -(-getattr(counts, of) * dtype.itemsize // _ALIGN) * _ALIGN
    return offsets, end


def _arrays(stage: torch.Tensor, counts: Counts) -> Columns:
    memory, offsets = stage.numpy(), _layout(counts)[0]
    return {
        name: memory[offsets[name] : offsets[name] + getattr(counts, of) * dtype.itemsize].view(_NUMPY[dtype])
        for name, dtype, of in _COLUMNS
    }


_NUMPY = {torch.int64: np.int64, torch.int32: np.int32, torch.bool: np.bool_}


def _write_padding(to: Columns) -> None:
    """Decodes of nobody: token 0 at position 0 of the guard row, with a context of one token."""
    for name, column in to.items():
        column[:] = int(name == "context_lens")
