"""Virtual memory of one CUDA device, and copies from and to it. This file and cuda_peers.py alone call the
CUDA driver, themselves or by native_cuda.c.

Per call from Python on an H100, 2 to 32 MiB alike: create 11 µs, map 2, set access 32, unmap 19,
release 13; one set-access over a range costs no less a chunk. Neither map nor unmap waits for
running kernels, so whoever unmaps must know that nothing in flight reads the range.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from cuda.bindings import driver

from engine.errors import ConfigError, DriverError
from engine.memory import native
from engine.memory.copies import Direction, Piece
from engine.memory.driver import ChunkDriver
from engine.memory.mapper import Call, Failure, Mapper, PythonMapper


class CudaVirtualMemory(ChunkDriver):
    """Implements `VirtualMemory`. A handle is a CUmemGenericAllocationHandle as an integer.

    Args:
        device: the CUDA device; its primary context is made current here, in the calling thread.
        chunk_bytes: a multiple of the allocation granularity (2 MiB on A100 and H100).
        margin_bytes: memory of the device that no chunk is made from, whoever else takes memory there.
        use_native: make the calls in C, and those of `submit` by a thread, if the helper can be built.
    """

    def __init__(
        self, device: torch.device, chunk_bytes: int, margin_bytes: int = 0, use_native: bool = True
    ) -> None:
        self._device = device
        self._index = device.index or 0
        torch.cuda.set_device(self._index)
        torch.empty(1, device=device)  # torch makes the primary context current in this thread
        self._context = driver_call(driver.cuCtxGetCurrent)
        self._properties = driver.CUmemAllocationProp()
        self._properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._properties.location.id = self._index
        minimum = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        granularity = driver_call(driver.cuMemGetAllocationGranularity, self._properties, minimum)
        if chunk_bytes % granularity:
            raise ConfigError(
                f"memory.chunk_bytes must be a multiple of {granularity} on this GPU, not {chunk_bytes}"
            )
        self._access = driver.CUmemAccessDesc()
        self._access.location = self._properties.location
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._ranges: dict[int, int] = {}
        self._limits = (chunk_bytes, margin_bytes)
        super().__init__(chunk_bytes, self._make_mapper(native.load() if use_native else None), _explain)

    def enter(self) -> None:
        # torch makes a context current with the first kernel of a thread. An engine whose first act was to
        # take a request over had its copies refused (CUDA_ERROR_INVALID_VALUE).
        torch.cuda.set_device(self._index)
        driver_call(driver.cuCtxSetCurrent, self._context)

    def reserve(self, num_chunks: int) -> int:
        nbytes = num_chunks * self.chunk_bytes
        address = int(
            driver_call(driver.cuMemAddressReserve, nbytes, self.chunk_bytes, driver.CUdeviceptr(0), 0)
        )
        self._ranges[address] = nbytes
        return address

    def view(self, address: int, num_chunks: int) -> torch.Tensor:
        """torch asks the driver about the first address only: refused if that is not mapped."""
        array = DeviceArray(address, num_chunks * self.chunk_bytes, self)
        return torch.as_tensor(array, device=self._device)

    def close(self) -> None:
        torch.cuda.synchronize(self._device)
        super().close()
        for address, nbytes in self._ranges.items():
            driver_call(driver.cuMemAddressFree, driver.CUdeviceptr(address), nbytes)
        self._ranges.clear()

    def _make_mapper(self, library: native.Library | None) -> Mapper:
        if library is None:
            return PythonMapper(_PythonCalls(self._properties, self._access, *self._limits))
        cuda = native.CudaFunctions(
            **{name: _address(function) for name, function in _FUNCTIONS.items()},
            context=int(self._context),
            properties=self._properties.getPtr(),
            access=self._access.getPtr(),
            chunk_bytes=self._limits[0],
            margin_bytes=self._limits[1],
        )
        calls = native.CallTable()
        library.quick.cuda_fill(ctypes.byref(cuda), ctypes.byref(calls))
        calls.owner = (cuda, self._properties, self._access)
        return native.NativeMapper(library, calls)


class _PythonCalls:
    """Implements `mapper.Calls`."""

    def __init__(self, properties: Any, access: Any, chunk_bytes: int, margin_bytes: int) -> None:
        self._chunk_bytes = chunk_bytes
        self._properties = properties
        self._access = access
        self._margin_bytes = margin_bytes

    def create(self) -> tuple[int, int]:
        error, handle = driver.cuMemCreate(self._chunk_bytes, self._properties, 0)
        return int(error), 0 if int(error) else int(handle)

    def map(self, address: int, handle: int) -> int:
        place, chunk = driver.CUdeviceptr(address), driver.CUmemGenericAllocationHandle(handle)
        return int(driver.cuMemMap(place, self._chunk_bytes, 0, chunk, 0)[0])

    def access(self, address: int) -> int:
        place = driver.CUdeviceptr(address)
        return int(driver.cuMemSetAccess(place, self._chunk_bytes, [self._access], 1)[0])

    def unmap(self, address: int) -> int:
        return int(driver.cuMemUnmap(driver.CUdeviceptr(address), self._chunk_bytes)[0])

    def release(self, handle: int) -> int:
        return int(driver.cuMemRelease(driver.CUmemGenericAllocationHandle(handle))[0])

    def room(self) -> int:
        error, free, _ = driver.cuMemGetInfo()
        return sys.maxsize if int(error) else (free - self._margin_bytes) // self._chunk_bytes


_FUNCTIONS = {
    "set_current": "cuCtxSetCurrent",
    "create": "cuMemCreate",
    "map": "cuMemMap",
    "set_access": "cuMemSetAccess",
    "unmap": "cuMemUnmap",
    "release": "cuMemRelease",
    "memory_info": "cuMemGetInfo_v2",
}
# Not cuMemcpyAsync: it would take an address that is not the device's for the host's, and read there.
_COPIES = {Direction.OUT: "cuMemcpyDtoHAsync", Direction.IN: "cuMemcpyHtoDAsync"}
_NAMES = {
    Call.CREATE: "cuMemCreate",
    Call.MAP: "cuMemMap",
    Call.ACCESS: "cuMemSetAccess",
    Call.UNMAP: "cuMemUnmap",
    Call.RELEASE: "cuMemRelease",
    Call.UNDO: "cuMemUnmap",
}


def _explain(failure: Failure) -> DriverError:
    call, code = failure
    if call is Call.MARGIN:
        return DriverError("cuMemCreate", "no more than the margin is free on the device")
    return DriverError(_NAMES[call], driver.CUresult(code).name)


def issue_copies(
    direction: Direction, pieces: Sequence[Piece], stream: int, library: native.Library | None
) -> None:
    """Have copies between the device and pinned host memory made on a stream, in order.

    Args:
        direction: of all of them.
        pieces: the copies.
        stream: a CUstream of the calling thread's context.
        library: the native helper: one call for all of them, beyond 64 without the interpreter's lock.

    Raises:
        DriverError: that copy and those behind it are not made. Those before it may be under way.
    """
    name = _COPIES[direction]
    if library is not None:
        code = library.copy(_address(f"{name}_v2"), pieces, stream)
    else:
        codes = (int(getattr(driver, name)(*piece, stream)[0]) for piece in pieces)
        code = next(filter(None, codes), 0)
    if code:
        raise DriverError(name, driver.CUresult(code).name)


@functools.cache
def _address(function: str) -> int:
    return ctypes.cast(getattr(ctypes.CDLL("libcuda.so.1"), function), ctypes.c_void_p).value or 0


class DeviceArray:
    """Raw device memory in the form that torch accepts from other libraries; a tensor keeps its owner."""

    def __init__(self, address: int, nbytes: int, owner: object) -> None:
        self._owner = owner
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
            "strides": None,
        }


def driver_call(function: Any, *arguments: Any) -> Any:
    """The results of a function of the CUDA driver. Raises DriverError."""
    error, *values = function(*arguments)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise DriverError(function.__name__, error.name)
    return values[0] if values else None
