"""Memory in which the ranks of a TP group leave their parts of a sum for one another."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Protocol

import torch

from engine.errors import DriverError
from engine.memory.cuda_peers import HANDLE_BYTES, CudaPeerMemory
from engine.model.rank_group import RankGroup
from kernels.peer_sum import PeerRoom, clear, sum_add_rms_norm

logger = logging.getLogger(__name__)

# A rank sends its part to all others. NCCL's way has more trips and moves less, and wins beyond this.
_MOST_BYTES = 16 << 20
_ALIGN = 256


class PeerMemory(Protocol):
    """See `CudaPeerMemory`."""

    address: int
    handle: bytes

    def view(self) -> torch.Tensor: ...

    def open(self, handle: bytes) -> int: ...

    def free(self) -> None: ...


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
    make: Callable[[torch.device, int], PeerMemory] = CudaPeerMemory,
) -> Peers | None:
    """Make such memory and open the others'; all ranks do so at the same time.

    Args:
        device: a CUDA device.
        places: sums that have room of their own.
        max_tokens: of the engine's largest step; there is room for no more than pays.
        width, dtype: of the parts.
        make: so many bytes of the device, to be shared.

    Returns:
        None on all ranks where one of them cannot: GPUs do not reach one another, say.
    """
    size, row_bytes = ranks.size, width * dtype.itemsize
    rows = max(1, min(max_tokens, _MOST_BYTES // (row_bytes * (size - 1))))
    room_bytes = -(-size * rows * row_bytes // _ALIGN) * _ALIGN
    memory = _make(ranks.rank, device, room_bytes * len(places), dtype, make)
    bases = _open_all(ranks, device, memory)
    if memory is None or not bases:
        return None
    starts = torch.tensor(bases, dtype=torch.int64, device=device)
    rooms = [
        PeerRoom(starts + place * room_bytes, rows, width, dtype, ranks.rank, size)
        for place in range(len(places))
    ]
    return Peers(rooms, memory)


def _make(
    rank: int,
    device: torch.device,
    nbytes: int,
    dtype: torch.dtype,
    make: Callable[[torch.device, int], PeerMemory],
) -> PeerMemory | None:
    """Memory without parts in it, or None if it cannot be shared."""
    try:
        memory = make(device, nbytes)
    except DriverError as error:
        logger.warning("rank %d shares no memory with the others: %s", rank, error)
        return None
    clear(memory.view().view(dtype))
    return memory


def _open_all(ranks: RankGroup, device: torch.device, memory: PeerMemory | None) -> list[int]:
    """Where each rank's memory is for this one's device; empty on all ranks if one of them cannot."""
    bases = [0] * ranks.size
    handles = _joined(ranks, device, bytes(HANDLE_BYTES) if memory is None else memory.handle)
    try:
        if memory is not None and all(map(any, handles)):
            bases = [
                memory.address if rank == ranks.rank else memory.open(theirs)
                for rank, theirs in enumerate(handles)
            ]
    except DriverError as error:
        logger.warning("rank %d does not reach the others' GPUs, sums go by NCCL: %s", ranks.rank, error)
    if all(map(any, _joined(ranks, device, bytes([all(bases)])))):
        return bases
    if memory is not None:
        memory.free()
    return []


def _joined(ranks: RankGroup, device: torch.device, part: bytes) -> list[bytes]:
    """Bytes of all ranks."""
    own = torch.frombuffer(bytearray(part), dtype=torch.uint8).to(device)
    parts = torch.zeros(ranks.size, len(part), dtype=torch.uint8, device=device)
    ranks.join(own, parts)
    return [bytes(one) for one in parts.tolist()]
