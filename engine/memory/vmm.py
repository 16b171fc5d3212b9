"""The driver protocol: address space and physical chunks, and nothing about what they hold.

Two drivers: `host_vmm.HostVirtualMemory` (memfd and mmap; CPU) and `cuda_vmm.CudaVirtualMemory`
(the CUDA driver's virtual memory calls). Both really map memory: what works on one works on the
other, and a stray access faults on both.

Calls come in two kinds. Those made at once take whole batches, so that many chunks cost one call from
Python. Those handed to `submit` are made by a thread of their own, one after another, that holds no
interpreter lock: beside a busy interpreter a Python thread needs 10 ms a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple, Protocol

import torch


class Move(NamedTuple):
    """A chunk from one place to another.

    Attributes:
        handle: of the chunk; None makes one first.
        source: where it is mapped now; None is nowhere.
        target: where to map it; None leaves it unmapped.
    """

    handle: int | None
    source: int | None
    target: int | None


class Outcome(Enum):
    """How a move ended."""

    DONE = "done"
    UNMAPPED = "unmapped"  # it left its source and could not be mapped at its target
    STAYED = "stayed"  # it is still mapped at its source
    NOT_MADE = "not made"  # the device had no memory for a new chunk


class Moved(NamedTuple):
    """The end of a move; `handle` is None only where a new chunk was not made."""

    handle: int | None
    outcome: Outcome


class VirtualMemory(Protocol):
    """Verbs on chunks of one size. The methods are called by one thread.

    Attributes:
        chunk_bytes: size of a chunk, a multiple of the driver's granularity.
        num_calls: create, map, unmap and release calls so far, one a chunk, made at once.
        num_calls_beside: those made by the thread behind `submit`.
    """

    chunk_bytes: int

    @property
    def num_calls(self) -> int: ...

    @property
    def num_calls_beside(self) -> int: ...

    def enter(self) -> None:
        """Make the device the calling thread's, for these verbs, for copies and for kernels. The thread that
        made the driver need not; any other begins with it.
        """

    def reserve(self, num_chunks: int) -> int:
        """Reserve address space for `num_chunks` chunks; the address, a multiple of `chunk_bytes`.

        Costs no memory. Touching it before `map` faults.
        """

    def create(self, count: int) -> list[int]:
        """Make physical chunks; their handles, fewer than `count` if the device has no more to give.

        Content is undefined. The refusal is logged.
        """

    def map(self, addresses: Sequence[int], handles: Sequence[int]) -> None:
        """Map each chunk at its address. One handle may be mapped at many addresses.

        Raises:
            DriverError: nothing of it is mapped.
        """

    def unmap(self, addresses: Sequence[int]) -> int:
        """Unmap the chunks at these addresses, in order, up to one that the driver refuses (logged); how
        many it were. Content stays with the handles.

        Does not wait for the device: nothing in flight may read them any more (on CUDA, a fault
        kills the context).
        """

    def release(self, handles: Sequence[int]) -> int:
        """Give chunks' memory back to the system, in order, up to one that the driver refuses (logged);
        how many it were. They must not be mapped anywhere.
        """

    def submit(self, moves: Sequence[Move]) -> int:
        """Hand moves to the mapping thread, behind those it has; a ticket.

        Until a ticket is done, its chunks and places are the thread's. Without the native helper the
        moves are made here and now.
        """

    def is_done(self, ticket: int) -> bool:
        """Whether every move of the ticket has ended."""

    def collect(self, ticket: int) -> list[Moved]:
        """How the moves of a ticket ended, in their order; waits until they have. Once for each ticket."""

    def view(self, address: int, num_chunks: int) -> torch.Tensor:
        """A uint8 tensor over a range whose first chunk is mapped; the rest may be mapped later.

        It keeps the driver alive: memory goes back once neither is referred to.
        """

    def close(self) -> None:
        """End the thread, return every range and chunk, now. Views must not be used any more."""
