"""From a step's plan to its logits: takes the plan to the device and runs the decoder there.

Most steps replay a CUDA graph: a Llama-3.1-8B step is over 300 kernels, whose launches from Python take
longer than the kernels themselves (14 ms against 8 at 64 sequences).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch

from engine.messages import BlockCopy, StepPlan
from engine.model.decoder import Batch, Decoder, LayerHook
from engine.model.graphs import GraphShape, GraphShapes, Record
from engine.model.inputs import Counts, StepInputs, StepLayout
from engine.model.rank_group import RankGroup
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


Words = tuple[tuple[int, ...], int, bool, tuple[tuple[int, int], ...], tuple[int, ...] | None]


class Launch(NamedTuple):
    """A step whose index tensors are written: what every rank needs to start it.

    Attributes:
        shape: the CUDA graph to replay; None launches kernel by kernel.
    """

    layout: StepLayout
    copies: tuple[BlockCopy, ...] = ()
    shape: GraphShape | None = None

    def words(self) -> Words:
        """The same in numbers alone, which pickle in a tenth of the 40 us that these classes take."""
        (counts, longest, has_pending), copies, shape = self
        rows = tuple((copy.source_row, copy.target_row) for copy in copies)
        return tuple(counts), longest, has_pending, rows, None if shape is None else tuple(shape)

    @classmethod
    def of_words(cls, words: Words) -> Launch:
        """From what `words` gave."""
        counts, longest, has_pending, rows, shape = words
        layout = StepLayout(Counts(*counts), longest, has_pending)
        copies = tuple(BlockCopy(*pair) for pair in rows)
        return cls(layout, copies, None if shape is None else GraphShape(*shape))


class ModelRunner:
    """Runs plans on one device.

    Args:
        decoder: with its weights on `device`.
        arena, kv_cache: the memory of the pool; what a plan needs has been reserved before `run`.
        last_tokens: (seats or more,) int64 on the device, the newest token chosen for each seat. What a
            plan calls pending is read from here.
        max_tokens, max_sequences: the largest plan.
        ranks: those that have the rest of the model.

    Attributes:
        inputs: the staging of steps.
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
        ranks: RankGroup | None = None,
    ) -> None:
        self._ranks = ranks
        self._decoder = decoder
        self._arena = arena
        self._kv_cache = kv_cache
        self._device = device
        self._last_tokens = last_tokens
        self.inputs = StepInputs(device, kv_cache, max_tokens, max_sequences, for_device(device))
        self._gathered = torch.zeros(max_sequences, dtype=torch.int64, device=device)
        self._replays: dict[GraphShape, Callable[[], object]] = {}
        self._shapes = GraphShapes(())

    def run(self, plan: StepPlan, offload: LayerHook | None = None) -> torch.Tensor:
        """Start a step: logits (rows or more, vocab), first those of the pieces that sample, in the plan's
        order. On a GPU it returns before they are computed; they hold until the next call.

        Args:
            offload: is told of each layer as it is launched.
        """
        return self.launch(self.prepare(plan, offload is not None), offload)

    def prepare(self, plan: StepPlan, has_hook: bool = False) -> Launch:
        """Write a step's index tensors, and choose how it is launched; one with a hook is never a graph."""
        shape = None if has_hook else self._shapes.fitting(plan)
        if shape is not None and not self._arena.is_backed(shape.tokens, shape.rows):
            shape = None
        return Launch(self.inputs.write(plan, shape), plan.copies, shape)

    @torch.inference_mode()
    def launch(self, step: Launch, hook: LayerHook | None = None) -> torch.Tensor:
        """Start the step that lies in `inputs`; as `run`."""
        for copy in step.copies:
            self._kv_cache.copy_rows(copy.source_row, copy.target_row)
        self.inputs.upload(step.layout)
        if step.shape is None:
            counts, batch = step.layout.counts, self.inputs.batch(step.layout)
            return self._forward(batch, counts.tokens, counts.rows, hook, step.layout.has_pending)
        self._replays[step.shape]()
        return self._arena.buffers(step.shape.tokens, step.shape.rows)["logits"]

    def finished(self, step: int) -> None:
        """Nothing here waits for that."""

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
            batch = self.inputs.put(StepPlan(0, (), 0), shape)
            self._replays[shape] = record(partial(self._forward, batch, shape.tokens, shape.rows))
        self._shapes = GraphShapes(self._replays)

    def _forward(
        self,
        batch: Batch,
        num_tokens: int,
        num_rows: int,
        hook: LayerHook | None = None,
        has_pending: bool = True,
    ) -> torch.Tensor:
        count = batch.num_decodes
        if count and has_pending:
            ids, gathered = batch.input_ids[:count], self._gathered[:count]
            torch.index_select(self._last_tokens, 0, batch.pending_seats, out=gathered)
            torch.where(batch.is_pending, gathered, ids, out=ids)
            if self._ranks is not None:
                self._ranks.spread(ids)  # tokens are chosen on the first rank
        buffers = self._arena.buffers(num_tokens, num_rows)
        return self._decoder.forward(batch, self._kv_cache.layer_views, buffers, hook)
