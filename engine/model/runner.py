"""From a step's plan to its logits: builds the index tensors and runs the decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Protocol

import torch

from engine.messages import Piece, StepPlan
from engine.model.decoder import Batch, Decoder


class Buffers(Protocol):
    """The part of `ActivationArena` a pass computes in."""

    def buffers(self, num_tokens: int, num_rows: int) -> Mapping[str, torch.Tensor]: ...


class KvLayers(Protocol):
    """The part of `KvCache` a pass reads and writes."""

    @property
    def layer_views(self) -> Sequence[torch.Tensor]: ...

    def first_row(self, slot: int) -> int: ...


class ModelRunner:
    """Runs plans on one device.

    Args:
        decoder: with its weights on `device`.
        arena, kv_cache: the memory of the pool; what a plan needs has been reserved before `run`.
    """

    def __init__(self, decoder: Decoder, arena: Buffers, kv_cache: KvLayers, device: torch.device) -> None:
        self._decoder = decoder
        self._arena = arena
        self._kv_cache = kv_cache
        self._device = device

    def run(self, plan: StepPlan) -> torch.Tensor:
        """Logits (rows, vocab) of the pieces that sample, in the plan's order.

        They hold until the next call.
        """
        buffers = self._arena.buffers(plan.num_tokens, plan.num_rows)
        return self._decoder.forward(self.batch(plan), self._kv_cache.layer_views, buffers)

    def synchronize(self) -> None:
        """Wait until the device has finished every step that `run` started."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def batch(self, plan: StepPlan) -> Batch:
        """The plan as index tensors on the device, in two transfers."""
        decodes, prefills = plan.pieces[: plan.num_decodes], plan.pieces[plan.num_decodes :]
        lengths = [len(piece.token_ids) for piece in plan.pieces]
        rows = [self._kv_cache.first_row(piece.slot) for piece in plan.pieces]
        ends = list(accumulate(lengths))
        query_starts = list(accumulate(lengths[plan.num_decodes :], initial=0))
        contexts = [piece.start + length for piece, length in zip(plan.pieces, lengths, strict=True)]
        input_ids, positions, token_rows, piece_rows, samples = self._transfer(
            torch.int64,
            [token for piece in plan.pieces for token in piece.token_ids],
            [position for piece in plan.pieces for position in _positions(piece)],
            [row for row, length in zip(rows, lengths, strict=True) for _ in range(length)],
            rows,
            [end - 1 for piece, end in zip(plan.pieces, ends, strict=True) if piece.samples],
        )
        context_lens, starts = self._transfer(torch.int32, contexts, query_starts)
        split = len(decodes)
        return Batch(
            input_ids=input_ids,
            positions=positions,
            token_first_rows=token_rows,
            num_decodes=split,
            decode_first_rows=piece_rows[:split],
            decode_context_lens=context_lens[:split],
            max_decode_context=max(contexts[:split], default=0),
            query_starts=starts,
            prefill_first_rows=piece_rows[split:],
            prefill_context_lens=context_lens[split:],
            max_query_len=max((len(piece.token_ids) for piece in prefills), default=0),
            sample_indices=samples,
        )

    def _transfer(self, dtype: torch.dtype, *columns: list[int]) -> tuple[torch.Tensor, ...]:
        flat = torch.tensor([value for column in columns for value in column], dtype=dtype)
        return tuple(torch.split(flat.to(self._device), [len(column) for column in columns]))


def _positions(piece: Piece) -> range:
    return range(piece.start, piece.start + len(piece.token_ids))
