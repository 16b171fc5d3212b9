"""What the engine's loop is put together from, as it sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from engine.memory.layer_wise import Offload
from engine.messages import MemorySnapshot, StepPlan
from engine.model.sampler import Sampled, SampleRow
from engine.sequence import Sequence as EngineSequence


class Runner(Protocol):
    """Computes a plan's logits; `engine.model.runner.ModelRunner` is the real one."""

    def run(self, plan: StepPlan, offload: Offload | None = None) -> torch.Tensor:
        """Start a step. Logits (rows that sample, or more, vocabulary).

        Args:
            offload: to be told of each layer, if the plan has a staged prompt.
        """

    def synchronize(self) -> None:
        """Wait until the device has finished everything that `run` started."""

    def finished(self, step: int) -> None:
        """The tokens of that step have been read, so it and those before it have ended."""


class PendingTokens(Protocol):
    """Tokens on their way from the device."""

    def wait(self) -> list[Sampled]:
        """One result a row, once the device has finished the step."""


class TokenSampler(Protocol):
    """Chooses tokens; `engine.model.sampler.Sampler` is the real one."""

    def launch(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> PendingTokens:
        """Start choosing a token for each row; does not wait for the device. There may be no rows."""


class OutsideMemory(Protocol):
    """The memory of the device that is not the pool's; `engine.footprint.Footprint` is the real one."""

    def describe(self, memory: MemorySnapshot) -> MemorySnapshot:
        """The snapshot with the bytes outside the pool filled in."""

    def release_unused(self) -> None:
        """Give back what libraries keep for later."""


def sample_row(seq: EngineSequence) -> SampleRow:
    """What the sampler needs to know of a sequence for its next token."""
    history = (seq.prompt_token_ids, tuple(seq.output_token_ids)) if seq.is_new_to_slot else None
    return SampleRow(seq.seat, seq.sampling, seq.seed, seq.num_outputs, history)
