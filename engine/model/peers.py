"""Memory in which the ranks of a TP group leave their parts of a sum for one another."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from enum import IntEnum

import torch

from engine.errors import DriverError
from engine.memory.cuda_peers import HANDLE_BYTES, PeerMemory
from engine.model.rank_group import RankGroup
from kernels.peer_sum import PeerRoom, clear, sum_add_rms_norm

logger = logging.getLogger(__name__)

# A rank sends its part to all others. NCCL's way has more trips and moves less, and wins beyond this.
_MOST_BYTES = 16 << 20
_ALIGN = 256


class Peers:
    """This rank's view of that memory. Lasts as long as the process, as CUDA graphs do that know it.

    Args:
        rooms: of each place's sums.
        memory: in which they are.

    Attributes:
        max_tokens: rows a sum may have.
    """

    def __init__(self, rooms: Sequence[PeerRoom], memory: PeerMemory) -> None:
        self._rooms = rooms
        self._memory = memory
        self.max_tokens = rooms[0].rows

    def add(
        self,
        place: int,
        part: torch.Tensor,
        residual: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        out: torch.Tensor,
        has_residual: bool,
    ) -> None:
        """See `kernels.peer_sum.sum_add_rms_norm`."""
        sum_add_rms_norm(self._rooms[place], part, residual, norm, eps, out, has_residual)


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
    size, row_bytes = ranks.size, width * dtype.itemsize
    rows = max(1, min(max_tokens, _MOST_BYTES // (row_bytes * (size - 1))))
    room_bytes = -(-size * rows * row_bytes // _ALIGN) * _ALIGN
    memory, bases = _open_all(ranks, device, room_bytes * len(places), dtype)
    if memory is None:
        return None
    starts = torch.tensor(bases, dtype=torch.int64, device=device)
    rooms = [
        PeerRoom(starts + place * room_bytes, rows, width, dtype, ranks.rank, size)
        for place in range(len(places))
    ]
    return Peers(rooms, memory)


def _open_all(
    ranks: RankGroup, device: torch.device, nbytes: int, dtype: torch.dtype
) -> tuple[PeerMemory | None, list[int]]:
    """This rank's memory and where each rank's is; None if one of the ranks could not."""
    memory, bases, handle = None, [0] * ranks.size, bytes(HANDLE_BYTES)
    try:
        memory = PeerMemory(device, nbytes)
        clear(memory.view().view(dtype))
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
