"""The first rank's runner: what it computes, all ranks compute."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from pickle import PickleBuffer

import torch

from engine.errors import EngineDeadError
from engine.memory.layer_wise import Offload
from engine.messages import StepPlan
from engine.model.decoder import LayerHook
from engine.model.graphs import GraphShape, Record
from engine.model.runner import ModelRunner
from engine.tp.followers import Followers
from engine.tp.orders import LAYER_DONE


class GroupRunner:
    """Implements `engine.parts.Runner` on all ranks.

    Args:
        own: computes the first rank's share.
        followers: compute theirs.
    """

    def __init__(self, own: ModelRunner, followers: Followers) -> None:
        self._own = own
        self._followers = followers
        self._num_runs = 0
        self._in_flight: deque[tuple[int, int]] = deque()  # step, and its number among all runs

    def run(self, plan: StepPlan, offload: Offload | None = None) -> torch.Tensor:
        """As `ModelRunner.run`.

        Raises:
            EngineDeadError: a rank is gone, or the first ran out of memory in a step that others compute.
        """
        step = self._own.prepare(plan, offload is not None)
        self._num_runs += 1
        self._in_flight.append((plan.step, self._num_runs))
        written = PickleBuffer(self._own.inputs.written(step.layout))
        self._followers.send("run", step.words(), written, offload is not None)
        hook = None if offload is None else _Relay(offload, self._followers)
        try:
            return self._own.launch(step, hook)
        except torch.OutOfMemoryError as error:
            raise EngineDeadError(f"the first rank ran out of memory beside its pool: {error}") from error

    def synchronize(self) -> None:
        """Wait until the devices have finished every run."""
        self._own.synchronize()
        self._in_flight.clear()
        self._followers.num_finished = self._num_runs

    def finished(self, step: int) -> None:
        """Its tokens have been read. It ended with an exchange of logits: no rank reads its KV any more."""
        while self._in_flight and self._in_flight[0][0] <= step:
            self._followers.num_finished = self._in_flight.popleft()[1]

    def capture(self, shapes: Iterable[GraphShape], record: Record) -> None:
        """As `ModelRunner.capture`. Ranks record the same shapes in the same order: recording runs them."""
        for shape in shapes:
            self._followers.send("capture", [shape])
            self._own.capture([shape], record)


class _Relay:
    """Lets the others do in the same layer what memory did here: copies go between launches."""

    def __init__(self, own: LayerHook, followers: Followers) -> None:
        self._own = own
        self._followers = followers

    def before(self, layer: int) -> None:
        self._own.before(layer)
        self._followers.send(LAYER_DONE)

    def after(self, layer: int) -> None:
        self._own.after(layer)
        self._followers.send(LAYER_DONE)
