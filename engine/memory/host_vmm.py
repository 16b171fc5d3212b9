"""Virtual memory on Linux without a GPU: one memfd is the physical memory, mmap maps its chunks.

It makes elastic memory real on a CPU: ranges are reserved without access rights, chunks appear at
fixed addresses, one chunk can appear at several, and released chunks go back to the system
(hole punching). Measured: 5 µs a map. A view over a mostly unmapped range works as long as nothing
touches the holes; touching one is a segmentation fault, as it would be a fault on a GPU.
"""

from __future__ import annotations

import ctypes
import errno
import io
import mmap
import os
import sys
import weakref
from typing import Any

import torch

from engine.errors import ConfigError, DriverError
from engine.memory import native
from engine.memory.driver import ChunkDriver
from engine.memory.mapper import Call, Failure, PythonMapper

_PROT_NONE, _PROT_READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
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


class HostVirtualMemory(ChunkDriver):
    """Implements `VirtualMemory`. A handle is the chunk's offset in the memfd.

    Stricter than Linux, and as strict as CUDA: a place is mapped once, and unmapped only if it is mapped.

    Args:
        chunk_bytes: a multiple of the page size.
        max_chunks: chunks there can be at once; one more is refused.
        use_native: make the calls in C, and those of `submit` by a thread, if the helper can be built.

    Raises:
        ConfigError: if that many chunks may exceed the number of mappings that Linux allows.
    """

    def __init__(self, chunk_bytes: int, max_chunks: int, use_native: bool = True) -> None:
        if chunk_bytes % mmap.PAGESIZE:
            raise ConfigError(f"memory.chunk_bytes must be a multiple of {mmap.PAGESIZE}, not {chunk_bytes}")
        max_places = _max_places()
        if max_chunks > max_places:
            raise ConfigError(
                f"a pool of {max_chunks} chunks may need {2 * max_chunks} mappings, more than this system "
                f"spares: raise memory.chunk_bytes to {chunk_bytes * 2} or more, or sysctl vm.max_map_count"
            )
        self._file = io.FileIO(os.memfd_create("ballonet-pool"), "r+")
        self._file.truncate(max_chunks * chunk_bytes)  # costs nothing until it is written to
        self._ranges: dict[int, int] = {}
        limits = (chunk_bytes, max_chunks, max_places)
        library = native.load() if use_native else None
        self._host: _NativeHost | _PythonHost
        self._host = (
            _NativeHost(library, self._file, *limits) if library else _PythonHost(self._file, *limits)
        )
        super().__init__(chunk_bytes, self._host.mapper, _explain)

    def reserve(self, num_chunks: int) -> int:
        """One chunk more than asked is reserved and the address rounded up to a whole chunk."""
        nbytes = (num_chunks + 1) * self.chunk_bytes
        base = int(_libc.mmap(None, nbytes, _PROT_NONE, _ANONYMOUS, -1, 0))
        if base == _FAILED:
            raise DriverError("mmap", os.strerror(ctypes.get_errno()))
        self._ranges[base] = nbytes
        address = -(-base // self.chunk_bytes) * self.chunk_bytes
        self._host.add_range(address, num_chunks)
        return address

    def view(self, address: int, num_chunks: int) -> torch.Tensor:
        nbytes = num_chunks * self.chunk_bytes
        buffer = (ctypes.c_char * nbytes).from_address(address)
        buffer.owner = self  # type: ignore[attr-defined]  # mapped for as long as the tensor lives
        return torch.frombuffer(buffer, dtype=torch.uint8)

    def close(self) -> None:
        super().close()
        for base, nbytes in self._ranges.items():
            _libc.munmap(base, nbytes)
        self._ranges.clear()
        self._file.close()


class _NativeHost:
    """The books of native_host.c, and its calls. They live as long as the table of calls."""

    def __init__(
        self, library: native.Library, file: io.FileIO, chunk_bytes: int, max_chunks: int, max_places: int
    ) -> None:
        self._library = library.quick
        calls = native.CallTable()
        limits = (chunk_bytes, max_chunks, max_places)
        self._host = self._library.host_open(file.fileno(), *limits, ctypes.byref(calls))
        if not self._host:
            raise MemoryError(f"no memory for the books of {max_chunks} chunks")
        weakref.finalize(calls, _free_host, self._library, self._host, file).atexit = False
        self.mapper = native.NativeMapper(library, calls)

    def add_range(self, address: int, num_chunks: int) -> None:
        """Chunks may be mapped there from now on."""
        if code := self._library.host_add_range(self._host, address, num_chunks):
            raise DriverError("calloc", os.strerror(code))


def _free_host(library: Any, host: int, file: io.FileIO) -> None:
    library.host_free(host)  # `file` stayed open until here


class _PythonHost:
    """Implements `mapper.Calls`."""

    def __init__(self, file: io.FileIO, chunk_bytes: int, max_chunks: int, max_places: int) -> None:
        self._file = file
        self._chunk_bytes = chunk_bytes
        self._max_places = max_places
        self._free = list(range((max_chunks - 1) * chunk_bytes, -1, -chunk_bytes))
        self._num_places: dict[int, int] = {}  # of each chunk
        self._handle_at: dict[int, int] = {}
        self._ranges: list[tuple[int, int]] = []
        self.mapper = PythonMapper(self)

    def add_range(self, address: int, num_chunks: int) -> None:
        """Chunks may be mapped there from now on."""
        self._ranges.append((address, address + num_chunks * self._chunk_bytes))

    def create(self) -> tuple[int, int]:
        if not self._free:
            return errno.ENOMEM, 0
        handle = self._free.pop()
        self._num_places[handle] = 0
        return 0, handle

    def map(self, address: int, handle: int) -> int:
        if handle not in self._num_places or not any(low <= address < high for low, high in self._ranges):
            return errno.EINVAL
        if address in self._handle_at:
            return errno.EEXIST
        if len(self._handle_at) >= self._max_places:
            return errno.ENOMEM
        flags = mmap.MAP_SHARED | _MAP_FIXED
        if code := _map_fixed(
            address, self._chunk_bytes, _PROT_READ_WRITE, flags, self._file.fileno(), handle
        ):
            return code
        self._handle_at[address] = handle
        self._num_places[handle] += 1
        return 0

    def access(self, address: int) -> int:
        return 0

    def unmap(self, address: int) -> int:
        if address not in self._handle_at:
            return errno.EINVAL
        if code := _map_fixed(address, self._chunk_bytes, _PROT_NONE, _ANONYMOUS | _MAP_FIXED, -1, 0):
            return code
        self._num_places[self._handle_at.pop(address)] -= 1
        return 0

    def release(self, handle: int) -> int:
        if handle not in self._num_places:
            return errno.EINVAL
        if self._num_places[handle]:
            return errno.EBUSY
        if _libc.fallocate(self._file.fileno(), _PUNCH_HOLE | _KEEP_SIZE, handle, self._chunk_bytes):
            return ctypes.get_errno()
        del self._num_places[handle]
        self._free.append(handle)
        return 0

    def room(self) -> int:
        return sys.maxsize


_NAMES = {Call.CREATE: "memfd", Call.RELEASE: "fallocate"}


def _explain(failure: Failure) -> DriverError:
    call, code = failure
    return DriverError(_NAMES.get(call, "mmap"), os.strerror(code))


def _map_fixed(address: int, nbytes: int, protection: int, flags: int, file: int, offset: int) -> int:
    result = _libc.mmap(address, nbytes, protection, flags, file, offset)
    return ctypes.get_errno() if result == _FAILED else 0


def _max_places() -> int:
    """Places that chunks may be mapped at: each costs two mappings, one for it and one for the gap beside it.

    A quarter of what Linux allows a process (vm.max_map_count) is left to the rest of it, or more if that has
    more by now. Beyond the limit unmapping fails too, and so does anybody's next allocation.
    """
    with open("/proc/sys/vm/max_map_count") as limit, open("/proc/self/maps") as maps:
        return (int(limit.read()) * 3 // 4 - sum(1 for _ in maps)) // 2
