"""From a step's plan to its logits: takes the plan to the device and runs the decoder there.

Most steps replay a CUDA graph: a Llama-3.1-8B step is over 300 kernels, whose launches from Python take
longer than the kernels themselves (14 ms against 8 at 64 sequences).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch

from engine.messages import StepPlan
from engine.model.decoder import Batch, Decoder, LayerHook
from engine.model.graphs import GraphShape, GraphShapes, Record
from engine.model.inputs import StepInputs
from kernels.backend import for_device


class Buffers(Protocol):
    """The part of `ActivationArena` a pass computes in."""

    def buffers(self, num_tokens: int, num_rows: int) -> Mapping[str, torch.Tensor]: ...

    def is_backed(self, num_tokens: int, num_rows: int) -> bool: ...


class KvLayers(Protocol):
    """The part of `KvCache` a pass reads and writes."""

    @property
    def layer_views(self) -> Sequence[torch.Tensor]: ...

    def first_row(self, slot: int) -> int: ...

    def copy_rows(self, source: int, target: int) -> None: ...


class ModelRunner:
    """Runs plans on one device.

    Args:
        decoder: with its weights on `device`.
        arena, kv_cache: the memory of the pool; what a plan needs has been reserved before `run`.
        last_tokens: (seats or more,) int64 on the device, the newest token chosen for each seat. What a
            plan calls pending is read from here.
        max_tokens, max_sequences: the largest plan.
    """

    def __init__(
        self,
        decoder: Decoder,
        arena: Buffers,
        kv_cache: KvLayers,
        device: torch.device,
        last_tokens: torch.Tensor,
        max_tokens: int,
        max_sequences: int,
    ) -> None:
        self._decoder = decoder
        self._arena = arena
        self._kv_cache = kv_cache
        self._device = device
        self._last_tokens = last_tokens
        self._inputs = StepInputs(device, kv_cache, max_tokens, max_sequences, for_device(device))
        self._gathered = torch.zeros(max_sequences, dtype=torch.int64, device=device)
        self._replays: dict[GraphShape, Callable[[], object]] = {}
        self._shapes = GraphShapes(())

    @torch.inference_mode()
    def run(self, plan: StepPlan, offload: LayerHook | None = None) -> torch.Tensor:
        """Start a step: logits (rows or more, vocab), first those of the pieces that sample, in the plan's
        order. On a GPU it returns before they are computed; they hold until the next call.
        """
        for copy in plan.copies:
            self._kv_cache.copy_rows(copy.source_row, copy.target_row)
        shape = self._shapes.fitting(plan) if offload is None else None  # a graph is one piece
        if shape is None or not self._arena.is_backed(shape.tokens, shape.rows):
            return self._forward(self._inputs.put(plan), plan.num_tokens, plan.num_rows, offload)
        self._inputs.refill(plan, shape)
        self._replays[shape]()
        return self._arena.buffers(shape.tokens, shape.rows)["logits"]

    def synchronize(self) -> None:
        """Wait until the device has finished every step that `run` started."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @torch.inference_mode()
    def capture(self, shapes: Iterable[GraphShape], record: Record) -> None:
        """Record a step of each shape. Largest first, CUDA graphs share the most memory.

        Buffers for the largest must be backed, and stay at their addresses for good: chunks behind them
        may change, since a graph knows addresses only.
        """
        for shape in shapes:
            batch = self._inputs.put(StepPlan(0, (), 0), shape)
            self._replays[shape] = record(partial(self._forward, batch, shape.tokens, shape.rows))
        self._shapes = GraphShapes(self._replays)

    def _forward(
        self, batch: Batch, num_tokens: int, num_rows: int, hook: LayerHook | None = None
    ) -> torch.Tensor:
        count = batch.num_decodes
        if count:
            ids, gathered = batch.input_ids[:count], self._gathered[:count]
            torch.index_select(self._last_tokens, 0, batch.pending_seats, out=gathered)
            torch.where(batch.is_pending, gathered, ids, out=ids)
        buffers = self._arena.buffers(num_tokens, num_rows)
        return self._decoder.forward(batch, self._kv_cache.layer_views, buffers, hook)
