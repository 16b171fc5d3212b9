"""Slabs: large pieces of host memory that a balloon cuts into chunks. Plain for a CPU, pinned for a GPU.

Pinned memory is registered here, and not asked of torch's host allocator, which rounds sizes up to powers of
two: a slab of 1.1 GiB would pin 2 GiB.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import weakref
from typing import Any, Protocol

import torch

from engine.errors import DriverError

logger = logging.getLogger(__name__)

_ALIGNMENT = 2 << 20  # of huge pages, and of whole chunks on a GPU
# Pages are touched in pieces of this size: the kernel holds the lock of the process's address space during
# one, and a step that maps memory waits for it.
_PIECE = 32 << 20
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, since Linux 5.14; Python's mmap has no name for it

_libc = ctypes.CDLL(None, use_errno=True)  # its calls give up the interpreter's lock; those of `mmap` do not
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Slab(Protocol):
    """Host memory that stays where it is until `free`."""

    @property
    def address(self) -> int:
        """Where it begins."""

    def free(self) -> None:
        """Give it back. Nothing may use it any more. It also goes back when nobody refers to the slab."""


class SlabMaker(Protocol):
    """Makes slabs, one at a time, in a background thread."""

    def make(self, nbytes: int) -> Slab:
        """A slab of that size.

        Raises:
            DriverError: the host has no such memory to give.
        """


class Pins(Protocol):
    """Page-locks host memory for a device, which is what makes copies asynchronous and fast."""

    def pin(self, address: int, nbytes: int) -> None:
        """Called by the thread that makes slabs: CUDA keeps a refusal for its thread, and reports it to the
        next kernel that is launched there.

        Raises:
            DriverError: the memory is not pinned.
        """

    def unpin(self, address: int) -> None:
        """Called by any thread. A refusal is logged."""


class PlainSlabs:
    """Memory that costs nothing until it is touched, for copies on a CPU. Implements `SlabMaker`."""

    def make(self, nbytes: int) -> Slab:
        return _Slab(nbytes)


class PinnedSlabs:
    """Memory in huge pages where there are any, touched and pinned before it is handed over.

    Implements `SlabMaker`.

    Args:
        device: the CUDA device that copies.
        pins: who pins; None is the CUDA runtime.
    """

    def __init__(self, device: torch.device, pins: Pins | None = None) -> None:
        self._pins = pins or CudaPins(device)

    def make(self, nbytes: int) -> Slab:
        slab = _Slab(nbytes)
        try:
            _touch(slab.address, nbytes)
            self._pins.pin(slab.address, nbytes)
        except DriverError:
            slab.free()
            raise
        return _PinnedSlab(slab, self._pins)


class CudaPins:
    """Pins through the CUDA runtime that torch has loaded; its calls give up the interpreter's lock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def pin(self, address: int, nbytes: int) -> None:
        torch.cuda.set_device(self._device)  # of this thread: the default would open a context on device 0
        _check("cudaHostRegister", _runtime().cudaHostRegister(address, nbytes, 0))

    def unpin(self, address: int) -> None:
        try:
            _check("cudaHostUnregister", _runtime().cudaHostUnregister(address))
        except DriverError as error:
            logger.warning("a slab stays pinned: %s", error)


class _Slab:
    """Anonymous memory, with a gap behind it: slabs never touch, and no copy runs over two registrations."""

    def __init__(self, nbytes: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        try:
            self._memory = mmap.mmap(-1, nbytes + _ALIGNMENT, flags=flags)
        except OSError as error:
            raise DriverError("mmap", os.strerror(error.errno or errno.ENOMEM)) from None
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.address = -(-base // _ALIGNMENT) * _ALIGNMENT

    def free(self) -> None:
        self._memory.close()


class _PinnedSlab:
    """Goes back with `free`, or when nobody refers to it."""

    def __init__(self, slab: Slab, pins: Pins) -> None:
        self.address = slab.address
        self._free = weakref.finalize(self, _unpin, slab, pins)
        self._free.atexit = False  # the system takes everything back, and the CUDA runtime may be gone

    def free(self) -> None:
        self._free()


def _unpin(slab: Slab, pins: Pins) -> None:
    pins.unpin(slab.address)
    slab.free()


def _touch(address: int, nbytes: int) -> None:
    """Have pages behind a range, huge ones if possible, without the interpreter's lock."""
    _libc.madvise(address, nbytes, mmap.MADV_HUGEPAGE)  # refused where there are none
    # A process that is forked off would have all pinned pages copied for it, at once.
    _libc.madvise(address, nbytes, mmap.MADV_DONTFORK)
    for piece in range(address, address + nbytes, _PIECE):
        piece_bytes = min(_PIECE, address + nbytes - piece)
        if _libc.madvise(piece, piece_bytes, _POPULATE_WRITE):
            code = ctypes.get_errno()
            if code != errno.EINVAL:  # that is an older kernel
                raise DriverError("madvise", os.strerror(code))
            ctypes.memset(piece, 0, piece_bytes)


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _check(call: str, code: Any) -> None:
    if code != _runtime().cudaError.success:
        raise DriverError(call, _runtime().cudaGetErrorString(code))
