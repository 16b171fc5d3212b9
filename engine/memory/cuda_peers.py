"""Memory of one GPU that the GPUs of other processes on its node read and write: CUDA's handles between
processes, which also work where each process sees its own GPU alone.
"""

from __future__ import annotations

import torch
from cuda.bindings import driver

from engine.errors import DriverError
from engine.memory.cuda_vmm import DeviceArray, driver_call

HANDLE_BYTES = 64


class CudaPeerMemory:
    """A range of this process' GPU, and the ranges of others, for as long as the process, or until `free`.

    Args:
        device: its context is current in the calling thread.
        nbytes: of the range.

    Attributes:
        address: of the range here.
        handle: `HANDLE_BYTES` bytes, by which other processes of the node `open` it.

    Raises:
        DriverError: there is no memory, or the driver shares none.
    """

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self._device = device
        self._nbytes = nbytes
        pointer = driver_call(driver.cuMemAlloc, nbytes)
        self.address = int(pointer)
        try:
            self.handle = bytes(driver_call(driver.cuIpcGetMemHandle, pointer).reserved)
        except DriverError:
            self.free()
            raise

    def view(self) -> torch.Tensor:
        """The range as bytes."""
        return torch.as_tensor(DeviceArray(self.address, self._nbytes, self), device=self._device)

    def free(self) -> None:
        """Give the range back. Nobody may use it any more."""
        driver_call(driver.cuMemFree, driver.CUdeviceptr(self.address))

    def open(self, handle: bytes) -> int:
        """Where another process' range is, for this one's GPU.

        Raises:
            DriverError: the two GPUs do not reach one another.
        """
        theirs = driver.CUipcMemHandle()
        theirs.reserved = handle
        flag = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        return int(driver_call(driver.cuIpcOpenMemHandle, theirs, int(flag.value)))
