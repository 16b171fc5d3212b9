"""The driver protocol: address space and physical chunks, and nothing about what they hold.

Two drivers: `host_vmm.HostVirtualMemory` (memfd and mmap; CPU) and `cuda_vmm.CudaVirtualMemory`
(the CUDA driver's virtual memory calls). Both really map memory: what works on one works on the
other, and a stray access faults on both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class VirtualMemory(Protocol):
    """Five verbs on chunks of one size. Calls raise DriverError and leave nothing half done.

    Attributes:
        chunk_bytes: size of a chunk, a multiple of the driver's granularity.
        num_calls: create, map, unmap and release calls so far, one a chunk.
    """

    chunk_bytes: int
    num_calls: int

    def reserve(self, num_chunks: int) -> int:
        """Reserve address space for `num_chunks` chunks; the address, a multiple of `chunk_bytes`.

        Costs no memory. Touching it before `map` faults.
        """

    def create(self) -> int:
        """Make one physical chunk; its handle. Content is undefined."""

    def map(self, address: int, handles: Sequence[int]) -> None:
        """Map chunks one after another from `address`. One handle may be mapped at many addresses."""

    def unmap(self, address: int, num_chunks: int) -> None:
        """Unmap mapped chunks one after another from `address`. Content stays with the handles.

        Does not wait for the device: nothing in flight may read them any more (on CUDA, a fault
        kills the context).
        """

    def release(self, handle: int) -> None:
        """Give a chunk's memory back to the system. It must not be mapped anywhere."""

    def view(self, address: int, num_chunks: int) -> torch.Tensor:
        """A uint8 tensor over a range whose first chunk is mapped; the rest may be mapped later."""

    def close(self) -> None:
        """Return every range and chunk. Views must be gone."""
