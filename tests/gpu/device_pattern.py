"""The pattern model on a device that is really asynchronous: two steps in flight, and nothing waits.

Keys and values are written and compared by kernels in the order of the stream, each at the moment its
step runs there; mismatches add up on the device. A chunk that is unmapped, lent or overwritten before
the step that reads it has run either faults or is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from engine.memory.layer_wise import Offload
from engine.memory.pool import MemoryPool
from engine.messages import StepPlan
from engine.model.sampler import Sampled, SampleRow
from tests.fakes import PatternRunner, PatternSampler, Ready


class DevicePatternRunner(PatternRunner):
    """Counts what is not as written.

    Attributes:
        num_wrong: (1,) int64 on the device.
    """

    def __init__(self, pool: MemoryPool, tokens_of: Callable[[str, int], Sequence[int]]) -> None:
        super().__init__(pool, tokens_of)
        self.num_wrong = torch.zeros(1, dtype=torch.int64, device=pool.kv.layer_views[0].device)
        self._logits = torch.zeros(1, 1)

    def run(self, plan: StepPlan, offload: Offload | None = None) -> torch.Tensor:
        super().run(plan, offload)
        return self._logits.expand(plan.num_rows, 1)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def _compare(self, *found_and_wanted: torch.Tensor) -> None:
        keys, wanted_keys, values, wanted_values = found_and_wanted
        self.num_wrong += (keys != wanted_keys).sum() + (values != wanted_values).sum()


class DevicePatternSampler(PatternSampler):
    """Hands its tokens over when the device has finished the step."""

    def launch(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> Ready:
        results = super().launch(logits, rows)._results
        event = torch.cuda.Event() if torch.cuda.is_available() else None
        if event is not None:
            event.record()
        return _AfterEvent(results, event)


class _AfterEvent(Ready):
    def __init__(self, results: list[Sampled], event: torch.cuda.Event | None) -> None:
        super().__init__(results)
        self._event = event

    def wait(self) -> list[Sampled]:
        if self._event is not None:
            self._event.synchronize()
        return super().wait()
