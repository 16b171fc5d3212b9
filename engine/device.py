"""What a device gives an engine: its driver, its link to host memory, and how much of it is free."""

from __future__ import annotations

import gc

import torch

from engine.config import MIB, MemoryConfig
from engine.errors import ConfigError
from engine.memory.copies import Copies, ThreadCopies
from engine.memory.host_memory import available_bytes
from engine.memory.host_vmm import HostVirtualMemory
from engine.memory.slabs import PinnedSlabs, PlainSlabs, SlabMaker
from engine.memory.vmm import VirtualMemory

_CPU_POOL_BYTES = 1024 * MIB


def make_driver(
    device: torch.device, chunk_bytes: int, memory: MemoryConfig, graph_bytes: int = 0
) -> tuple[VirtualMemory, int]:
    """The device's driver, and the pool's budget in chunks.

    On a GPU the budget is what is free now, after the weights, less a stated margin: no fraction of
    the card is guessed, and another process on it is simply not counted.

    Args:
        graph_bytes: what CUDA graphs may take afterwards; measured once they are there.
    """
    if device.type == "cuda":
        from engine.memory.cuda_vmm import CudaVirtualMemory  # a CPU machine may lack the CUDA driver

        free = free_bytes(device)
        nbytes = memory.pool_bytes or free - memory.margin_bytes - graph_bytes
        if nbytes > free:
            raise ConfigError(
                f"memory.pool_bytes is {nbytes / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free on "
                f"{device} after the weights: lower it, or leave it out to have it measured"
            )
        return CudaVirtualMemory(device, chunk_bytes, memory.margin_bytes), max(0, nbytes) // chunk_bytes
    nbytes = memory.pool_bytes or _CPU_POOL_BYTES
    if nbytes > available_bytes():
        raise ConfigError(
            f"the pool wants {nbytes / 2**30:.1f} GiB, and {available_bytes() / 2**30:.1f} GiB of memory are "
            "available: lower memory.pool_bytes"
        )
    return HostVirtualMemory(chunk_bytes, nbytes // chunk_bytes), nbytes // chunk_bytes


def make_link(device: torch.device, chunk_bytes: int) -> tuple[Copies, SlabMaker]:
    """What copies chunks between a device and the host, and what makes host memory for it."""
    if device.type == "cuda":
        from engine.memory.cuda_copies import CudaCopies  # as for the driver

        return CudaCopies(device, chunk_bytes), PinnedSlabs(device)
    return ThreadCopies(chunk_bytes), PlainSlabs()


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that nobody has, torch's idle blocks included."""
    gc.collect()  # an engine that was dropped may still have its memory
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])
