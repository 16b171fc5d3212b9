"""What of a device's memory is not the pool's: weights, CUDA graphs, and what libraries keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from engine.messages import MemorySnapshot

_LOOK_EVERY = 512  # snapshots; asking torch takes some 50 us


class Footprint:
    """Watches an engine's start on one device, and what torch takes afterwards.

    Make it before anything of the engine is on the device. What another process takes during the start
    is counted as ours; later it is not.

    Args:
        release_others: has the other ranks of a TP group give back what their libraries keep.
    """

    def __init__(self, device: torch.device, release_others: Callable[[], None] | None = None) -> None:
        self._device = device
        self._release_others = release_others
        self._is_cuda = device.type == "cuda"
        self._free_at_start = self._free()
        self._weight_bytes = 0
        self._graph_bytes = 0
        self._workspace_at_start = self._workspace_bytes = 0
        self._reserved_at_start = 0
        self._num_snapshots = 0

    def started(self, weight_bytes: int, graph_bytes: int, pool_bytes: int) -> None:
        """The engine is there: what is neither weights, graphs nor chunks of the pool is workspace."""
        self._weight_bytes, self._graph_bytes = weight_bytes, graph_bytes
        if self._is_cuda:
            used = self._free_at_start - self._free()
            self._workspace_at_start = max(0, used - weight_bytes - graph_bytes - pool_bytes)
            self._reserved_at_start = torch.cuda.memory_reserved(self._device)
            self._look()

    def describe(self, memory: MemorySnapshot) -> MemorySnapshot:
        """The snapshot with the bytes outside the pool filled in."""
        if self._is_cuda and self._num_snapshots % _LOOK_EVERY == 0:
            self._look()
        self._num_snapshots += 1
        return replace(
            memory,
            weight_bytes=self._weight_bytes,
            graph_bytes=self._graph_bytes,
            workspace_bytes=self._workspace_bytes,
        )

    def release_unused(self) -> None:
        """Give back what torch keeps for later."""
        if self._release_others is not None:
            self._release_others()
        if self._is_cuda:
            torch.cuda.empty_cache()
            self._look()

    def bytes_of(self, work: Callable[[], object], pool_bytes: Callable[[], int]) -> int:
        """Bytes the device loses to `work`, apart from chunks that the pool makes meanwhile."""
        if not self._is_cuda:
            work()
            return 0
        torch.cuda.empty_cache()
        before = self._free() + pool_bytes()
        work()
        torch.cuda.empty_cache()
        return max(0, before - self._free() - pool_bytes())

    def _look(self) -> None:
        gained = torch.cuda.memory_reserved(self._device) - self._reserved_at_start
        self._workspace_bytes = max(0, self._workspace_at_start + gained)

    def _free(self) -> int:
        return torch.cuda.mem_get_info(self._device)[0] if self._is_cuda else 0
