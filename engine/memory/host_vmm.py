"""Virtual memory on Linux without a GPU: one memfd is the physical memory, mmap maps its chunks.

It makes elastic memory real on a CPU: ranges are reserved without access rights, chunks appear at
fixed addresses, one chunk can appear at several, and released chunks go back to the system
(hole punching). Measured: 5 µs a map. A view over a mostly unmapped range works as long as nothing
touches the holes; touching one is a segmentation fault, as it would be a fault on a GPU.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence

import torch

from engine.errors import ConfigError, DriverError

_PROT_NONE, _PROT_READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_FAILED = ctypes.c_void_p(-1).value
_PUNCH_HOLE, _KEEP_SIZE = 0x02, 0x01

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class HostVirtualMemory:
    """Implements `VirtualMemory`. A handle is the chunk's offset in the memfd.

    Args:
        chunk_bytes: a multiple of the page size.
        max_chunks: chunks that will ever be created at once. Linux limits mappings a process
            (vm.max_map_count), and every chunk can cost two: one for it, one for the gap beside it.

    Raises:
        ConfigError: if that many chunks may exceed the limit.
    """

    def __init__(self, chunk_bytes: int, max_chunks: int) -> None:
        if chunk_bytes % mmap.PAGESIZE:
            raise ConfigError(f"memory.chunk_bytes must be a multiple of {mmap.PAGESIZE}, not {chunk_bytes}")
        limit = _max_map_count()
        if 2 * max_chunks > limit * 3 // 4:
            raise ConfigError(
                f"a pool of {max_chunks} chunks may need {2 * max_chunks} mappings, and this system allows "
                f"{limit}: raise memory.chunk_bytes to {chunk_bytes * 2} or more, or sysctl vm.max_map_count"
            )
        self.chunk_bytes = chunk_bytes
        self.num_calls = 0
        self._file = os.memfd_create("ballonet-pool")
        self._end = 0
        self._recycled: list[int] = []
        self._ranges: dict[int, int] = {}

    def reserve(self, num_chunks: int) -> int:
        """One chunk more than asked is reserved and the address rounded up to a whole chunk."""
        nbytes = (num_chunks + 1) * self.chunk_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        base = _mmap(None, nbytes, _PROT_NONE, flags, -1, 0)
        self._ranges[base] = nbytes
        return -(-base // self.chunk_bytes) * self.chunk_bytes

    def create(self) -> int:
        self.num_calls += 1
        if self._recycled:
            return self._recycled.pop()
        handle = self._end
        try:
            os.ftruncate(self._file, handle + self.chunk_bytes)
        except OSError as error:
            raise DriverError("ftruncate", error.strerror or str(error)) from error
        self._end += self.chunk_bytes
        return handle

    def map(self, address: int, handles: Sequence[int]) -> None:
        for index, handle in enumerate(handles):
            self.num_calls += 1
            try:
                _mmap(
                    address + index * self.chunk_bytes,
                    self.chunk_bytes,
                    _PROT_READ_WRITE,
                    mmap.MAP_SHARED | _MAP_FIXED,
                    self._file,
                    handle,
                )
            except DriverError:
                if index:
                    self.unmap(address, index)
                raise

    def unmap(self, address: int, num_chunks: int) -> None:
        self.num_calls += num_chunks
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
        _mmap(address, num_chunks * self.chunk_bytes, _PROT_NONE, flags, -1, 0)

    def release(self, handle: int) -> None:
        self.num_calls += 1
        if _libc.fallocate(self._file, _PUNCH_HOLE | _KEEP_SIZE, handle, self.chunk_bytes):
            raise DriverError("fallocate", os.strerror(ctypes.get_errno()))
        self._recycled.append(handle)

    def view(self, address: int, num_chunks: int) -> torch.Tensor:
        nbytes = num_chunks * self.chunk_bytes
        buffer = (ctypes.c_char * nbytes).from_address(address)
        return torch.frombuffer(buffer, dtype=torch.uint8)

    def close(self) -> None:
        for base, nbytes in self._ranges.items():
            _libc.munmap(base, nbytes)
        self._ranges.clear()
        os.close(self._file)


def available_bytes() -> int:
    """Memory the system could still give out. Touching more than that ends in the kernel killing us."""
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["MemAvailable"].split()[0]) * 1024


def _mmap(address: int | None, nbytes: int, protection: int, flags: int, file: int, offset: int) -> int:
    result = _libc.mmap(address, nbytes, protection, flags, file, offset)
    if result == _FAILED or result is None:
        raise DriverError("mmap", os.strerror(ctypes.get_errno()))
    return int(result)


def _max_map_count() -> int:
    with open("/proc/sys/vm/max_map_count") as file:
        return int(file.read())
