"""Memory in which the ranks of a TP group leave their parts of a sum for one another's GPUs to read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from enum import IntEnum

import torch

from engine.errors import DriverError
from engine.memory.cuda_peers import HANDLE_BYTES, PeerMemory
from engine.model.rank_group import RankGroup
from kernels.peer_sum import PeerParts, sum_add_rms_norm

logger = logging.getLogger(__name__)

# A rank reads all others' parts. NCCL's way has more trips and moves less, and wins beyond this.
_MOST_BYTES = 8 << 20
_ALIGN = 256
_FLAG_BYTES = 4


class Peers:
    """This rank's view of that memory. Lasts as long as the process, as CUDA graphs do that know it.

    Args:
        parts: of each place's sums.
        memory: in which they are.

    Attributes:
        max_tokens: rows a sum may have.
    """

    def __init__(self, parts: Sequence[PeerParts], memory: PeerMemory) -> None:
        self._parts = parts
        self._memory = memory
        self.max_tokens: int = parts[0].part.shape[0]

    def room(self, place: int, num_tokens: int) -> torch.Tensor:
        """Where this rank's part of a sum has to be written: (tokens, width)."""
        return self._parts[place].part[:num_tokens]

    def add(
        self,
        place: int,
        hidden: torch.Tensor,
        residual: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        has_residual: bool,
    ) -> None:
        """See `kernels.peer_sum.sum_add_rms_norm`, into `hidden`."""
        sum_add_rms_norm(self._parts[place], residual, norm, eps, hidden, has_residual)


def find_peers(
    ranks: RankGroup,
    device: torch.device,
    places: type[IntEnum],
    max_tokens: int,
    width: int,
    dtype: torch.dtype,
) -> Peers | None:
    """Make such memory and open the others'; all ranks do so at the same time.

    Args:
        device: a CUDA device.
        places: sums that have room of their own.
        max_tokens: of the engine's largest step; there is room for no more than pays.
        width, dtype: of the parts.

    Returns:
        None on all ranks where one of them cannot: GPUs do not reach one another, say.
    """
    most = max(1, min(max_tokens, _MOST_BYTES // (width * dtype.itemsize)))
    part_bytes = _aligned(most * width * dtype.itemsize)
    place_bytes = part_bytes + _aligned(most * ranks.size * _FLAG_BYTES)
    memory, bases = _open_all(ranks, device, place_bytes * len(places))
    if memory is None:
        return None
    whole, parts = memory.view(), []
    for place in range(len(places)):
        begin = place * place_bytes
        own = whole[begin : begin + most * width * dtype.itemsize].view(dtype).view(most, width)
        starts = torch.tensor(bases, dtype=torch.int64, device=device) + begin
        epochs = torch.zeros(most, dtype=torch.int32, device=device)
        parts.append(PeerParts(own, starts, starts + part_bytes, epochs, ranks.rank, ranks.size))
    return Peers(parts, memory)


def _open_all(ranks: RankGroup, device: torch.device, nbytes: int) -> tuple[PeerMemory | None, list[int]]:
    """This rank's memory and where each rank's is; None if one of the ranks could not."""
    memory, bases, handle = None, [0] * ranks.size, bytes(HANDLE_BYTES)
    try:
        memory = PeerMemory(device, nbytes)
        handle = memory.handle
    except DriverError as error:
        logger.warning("rank %d shares no memory with the others: %s", ranks.rank, error)
    handles = _joined(ranks, device, handle)
    try:
        if memory is not None and all(map(any, handles)):
            bases = [
                memory.address if rank == ranks.rank else memory.open(theirs)
                for rank, theirs in enumerate(handles)
            ]
    except DriverError as error:
        logger.warning("rank %d does not reach the others' GPUs, sums go by NCCL: %s", ranks.rank, error)
    can_all = all(map(any, _joined(ranks, device, bytes([all(bases)]))))
    return (memory, bases) if can_all else (None, [])


def _joined(ranks: RankGroup, device: torch.device, part: bytes) -> list[bytes]:
    """Bytes of all ranks."""
    own = torch.frombuffer(bytearray(part), dtype=torch.uint8).to(device)
    parts = torch.zeros(ranks.size, len(part), dtype=torch.uint8, device=device)
    ranks.join(own, parts)
    return [bytes(one) for one in parts.tolist()]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN
