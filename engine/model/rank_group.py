"""The sums and exchanges between the ranks of a TP group, in the order of the device's stream.

NCCL between GPUs, gloo between CPU processes. Every rank makes the same calls in the same order: a rank that
does not come leaves the others waiting, so whoever starts the group watches its processes.
"""

from __future__ import annotations

import os
import weakref
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from engine.errors import EngineDeadError

_START_S = 600.0  # the slowest rank may have compiled, or downloaded, for minutes before it joins


class RankGroup:
    """One rank's door to the others, for as long as somebody refers to it.

    Attributes:
        backend: of torch.distributed; None is NCCL for GPUs and gloo for CPUs.

    Args:
        rank, size: its place.
        store: a file that all ranks see and none has made; how they find one another.
        device: where its tensors are. A process can be in one such group at a time, with NCCL in one ever.

    Raises:
        EngineDeadError: the others did not come.
    """

    backend: str | None = None

    def __init__(self, rank: int, size: int, store: Path, device: torch.device) -> None:
        self.rank = rank
        self.size = size
        # Chunks behind an address change: a graph may not remember which were there when it was recorded.
        os.environ.update(NCCL_GRAPH_REGISTER="0", NCCL_LOCAL_REGISTER="0")
        backend = self.backend or ("nccl" if device.type == "cuda" else "gloo")
        try:
            dist.init_process_group(
                backend,
                init_method=f"file://{store}",
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=_START_S),
                device_id=device if backend == "nccl" else None,
            )
        except (RuntimeError, ValueError) as error:
            raise EngineDeadError(f"rank {rank} of {size} did not find the others: {error}") from None
        weakref.finalize(self, _leave).atexit = False  # the system takes everything back

    def sum(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by its sum over the ranks."""
        dist.all_reduce(tensor)

    def spread(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by that of the first rank."""
        dist.broadcast(tensor, src=0)

    def join(self, part: torch.Tensor, parts: torch.Tensor) -> None:
        """Collect the tensors of all ranks.

        Args:
            part: this rank's, contiguous, of any shape.
            parts: (size, *shape of a part), contiguous.
        """
        dist.all_gather_into_tensor(parts.view(-1), part.view(-1))


def _leave() -> None:
    # NCCL waits for CUDA graphs that hold its sums, even where it is aborted (2.28): the process ends it.
    if dist.is_initialized() and dist.get_backend() != "nccl":
        dist.destroy_process_group()
