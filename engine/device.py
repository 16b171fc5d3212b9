"""What a device gives an engine: its driver, its link to host memory, and how much of it is free."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable

import torch

from engine.config import MIB, MemoryConfig
from engine.errors import ConfigError
from engine.memory.copies import Copies, ThreadCopies
from engine.memory.host_memory import available_bytes
from engine.memory.host_vmm import HostVirtualMemory
from engine.memory.slabs import PinnedSlabs, PlainSlabs, SlabMaker
from engine.memory.vmm import VirtualMemory

logger = logging.getLogger(__name__)

_CPU_POOL_BYTES = 1024 * MIB
_OTHERS_GIVE_BACK_S = 120.0  # four times what a controller waits for a group that does not answer
_LOOK_S = 0.5


def make_driver(
    device: torch.device, chunk_bytes: int, memory: MemoryConfig, graph_bytes: int = 0
) -> tuple[VirtualMemory, int]:
    """The device's driver, and the pool's budget in chunks.

    On a GPU the budget is what is free now, after the weights, less a stated margin: no fraction of
    the card is guessed, and another process on it is simply not counted. Of a shared one it is this
    engine's part, whatever the others have taken yet.

    Args:
        graph_bytes: what CUDA graphs may take afterwards; measured once they are there.
    """
    if device.type == "cuda":
        from engine.memory.cuda_vmm import CudaVirtualMemory  # a CPU machine may lack the CUDA driver

        free = free_bytes(device)
        nbytes = memory.pool_bytes or pool_room(device, memory, free) - graph_bytes
        if nbytes > free:
            raise ConfigError(
                f"memory.pool_bytes is {nbytes / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free on "
                f"{device} after the weights: lower it, or leave it out to have it measured"
            )
        return CudaVirtualMemory(device, chunk_bytes, memory.margin_bytes), max(0, nbytes) // chunk_bytes
    nbytes = memory.pool_bytes or int(_CPU_POOL_BYTES * memory.device_share)
    if nbytes > available_bytes():
        raise ConfigError(
            f"the pool wants {nbytes / 2**30:.1f} GiB, and {available_bytes() / 2**30:.1f} GiB of memory are "
            "available: lower memory.pool_bytes"
        )
    most = int(nbytes / memory.device_share)  # if all others give it theirs
    return HostVirtualMemory(chunk_bytes, most // chunk_bytes), nbytes // chunk_bytes


def pool_room(device: torch.device, memory: MemoryConfig, free: int, pool_bytes: int = 0) -> int:
    """Bytes of a GPU that a pool may come to.

    Args:
        free: on the device.
        pool_bytes: of the pool, already made.
    """
    room = free + pool_bytes - memory.margin_bytes
    if memory.device_share == 1:
        return room
    # Not by what is free: another engine may take its part, or load its weights, at this moment. What torch
    # holds are weights, graphs and workspaces; the CUDA context lies in the margin.
    part = int(torch.cuda.mem_get_info(device)[1] * memory.device_share)
    return min(room, part - torch.cuda.memory_reserved(device) - memory.margin_bytes)


def wait_for_part(
    needed: int, free: Callable[[], int], clock: Callable[[], float], sleep: Callable[[float], None]
) -> bool:
    """Wait until so many bytes of a shared device are free, for a while; whether they are.

    An engine that is started again finds that others were lent what it had. The controller takes it back
    once it counts the dead one as gone, which is what takes long.
    """
    started, has_told = clock(), False
    while free() < needed:
        if clock() - started > _OTHERS_GIVE_BACK_S:
            logger.warning("others still have %.1f GiB of this engine's part", (needed - free()) / 2**30)
            return False
        if not has_told:
            has_told = True
            logger.info("waiting for %.1f GiB that others on the device were lent", needed / 2**30)
        sleep(_LOOK_S)
    return True


def wait_for_shared(device: torch.device, memory: MemoryConfig, clock: Callable[[], float]) -> None:
    """Before anything is loaded: the part of a shared GPU has to be there."""
    if device.type == "cuda" and memory.device_share < 1:
        part = int(torch.cuda.mem_get_info(device)[1] * memory.device_share)
        wait_for_part(part - memory.margin_bytes, lambda: free_bytes(device), clock, time.sleep)


def shared_name(device: torch.device, memory: MemoryConfig) -> str:
    """What a device is called among the engines of its node that share it; empty if it is not shared."""
    if memory.device_share == 1:
        return ""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else "cpu"


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
