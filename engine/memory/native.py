"""The native helper: built on first use with the machine's C compiler, and what Python sees of it.

It makes a batch's driver calls without the interpreter's lock, and has the thread behind `submit`. The
sources are `native_*.c`; they need neither Python's headers nor CUDA's. Without a compiler the drivers use
`mapper.PythonMapper`, and one warning says what that costs.

A forked child has no thread: it must not use a driver of its parent.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import weakref
from array import array
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from engine.memory.copies import Piece
from engine.memory.mapper import Batch

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_SOURCES = ("native_calls.h", "native_mapper.c", "native_host.c", "native_cuda.c")
_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-std=c11", "-O2", "-shared", "-fPIC", "-pthread")
_BUILD_TIMEOUT_S = 120.0
# Batches up to this size keep the interpreter's lock: beside a busy thread 4 maps took 18 µs with it, and
# 5.2 ms where the other thread took it meanwhile (sys.getswitchinterval). On a GPU 64 maps take 2 ms.
_LARGEST_WITH_LOCK = 64

_POINTER, _U64, _INT = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int


class CallTable(ctypes.Structure):
    """`struct calls` of native_calls.h: the driver calls of a backend. C looks each up when it makes it."""

    _fields_ = [
        ("context", _POINTER),
        ("enter", ctypes.CFUNCTYPE(_INT, _POINTER)),
        ("create", ctypes.CFUNCTYPE(_INT, _POINTER, ctypes.POINTER(_U64))),
        ("map", ctypes.CFUNCTYPE(_INT, _POINTER, _U64, _U64)),
        ("access", ctypes.CFUNCTYPE(_INT, _POINTER, _U64)),
        ("unmap", ctypes.CFUNCTYPE(_INT, _POINTER, _U64)),
        ("release", ctypes.CFUNCTYPE(_INT, _POINTER, _U64)),
        ("room", ctypes.CFUNCTYPE(_U64, _POINTER)),
    ]


class CudaFunctions(ctypes.Structure):
    """`struct cuda` of native_cuda.c: addresses of the driver's functions, and what they are called with."""

    _fields_ = [
        *((name, _POINTER) for name in ("set_current", "create", "map", "set_access", "unmap", "release")),
        ("memory_info", _POINTER),
        ("context", _POINTER),
        ("properties", _POINTER),
        ("access", _POINTER),
        ("chunk_bytes", _U64),
        ("margin_bytes", _U64),
    ]


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "mapper_open": (_POINTER, (ctypes.POINTER(CallTable),)),
    "mapper_run": (_U64, (_POINTER, _POINTER, _INT)),
    "mapper_submit": (_INT, (_POINTER, _POINTER)),
    "mapper_wait": (None, (_POINTER, _POINTER)),
    "mapper_num_calls": (_U64, (_POINTER, _INT)),
    "mapper_close": (None, (_POINTER,)),
    "mapper_free": (None, (_POINTER,)),
    "host_open": (_POINTER, (_INT, _U64, _U64, _U64, ctypes.POINTER(CallTable))),
    "host_add_range": (_INT, (_POINTER, _U64, _U64)),
    "host_free": (None, (_POINTER,)),
    "cuda_fill": (None, (ctypes.POINTER(CudaFunctions), ctypes.POINTER(CallTable))),
    "cuda_copy": (_INT, (_POINTER, _POINTER, _POINTER, _U64)),
}


class Library:
    """The loaded helper. `quick` keeps the interpreter's lock during a call, `slow` gives it up."""

    def __init__(self, slow: ctypes.CDLL) -> None:
        self.slow: Any = slow
        self.quick: Any = ctypes.PyDLL(slow._name, handle=slow._handle)
        for name, (result, arguments) in _SIGNATURES.items():
            for library in (self.slow, self.quick):
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments

    def copy(self, function: int, pieces: Sequence[Piece], stream: int) -> int:
        """Hand copies to a driver, in order, up to one that it refuses: its code, 0 if there is none.

        Args:
            function: address of its cuMemcpyDtoHAsync or cuMemcpyHtoDAsync.
            pieces: the copies.
            stream: the CUstream that they are made on.
        """
        words = array("Q", chain.from_iterable(pieces))
        library = self.quick if len(pieces) <= _LARGEST_WITH_LOCK else self.slow
        return int(library.cuda_copy(function, stream, words.buffer_info()[0], len(pieces)))


class NativeMapper:
    """Implements `mapper.Mapper` in C.

    Args:
        library: the loaded helper.
        calls: the backend's calls, with whatever they need alive in its attribute `owner`.
    """

    def __init__(self, library: Library, calls: CallTable) -> None:
        self.calls = calls
        self._library = library
        self._process = os.getpid()
        self._has_warned = False
        self._mapper = library.quick.mapper_open(ctypes.byref(calls))
        if not self._mapper:
            raise MemoryError("no memory for the mapping thread's queue")
        weakref.finalize(self, library.quick.mapper_free, self._mapper).atexit = False

    @property
    def num_calls(self) -> int:
        return int(self._library.quick.mapper_num_calls(self._mapper, 0))

    @property
    def num_calls_beside(self) -> int:
        return int(self._library.quick.mapper_num_calls(self._mapper, 1))

    def run(self, batch: Batch, stop: bool) -> int:
        library = self._library.quick if len(batch) <= _LARGEST_WITH_LOCK else self._library.slow
        return int(library.mapper_run(self._mapper, batch.address, stop))

    def submit(self, batch: Batch) -> None:
        if code := self._library.quick.mapper_submit(self._mapper, batch.address):
            if not self._has_warned:
                logger.warning("no mapping thread: %s; steps wait for these calls", os.strerror(code))
            self._has_warned = True
            self.run(batch, stop=False)

    def wait(self, batch: Batch) -> None:
        library = self._library.quick if batch.is_done else self._library.slow
        library.mapper_wait(self._mapper, batch.address)

    def close(self) -> None:
        if os.getpid() == self._process:  # a forked child has no thread to wait for
            self._library.slow.mapper_close(self._mapper)


@functools.cache
def load() -> Library | None:
    """The helper, or None, with a warning, where it cannot be had. Built once for a machine's compiler."""
    try:
        cache = Path.home() / ".cache" / "ballonet"
    except RuntimeError:  # a user without a home
        cache = None
    return load_with(find_compiler(), cache)


def find_compiler() -> str | None:
    """The path of a C compiler."""
    return next(filter(None, map(shutil.which, _COMPILERS)), None)


def load_with(compiler: str | None, cache: Path | None) -> Library | None:
    """The helper as a compiler builds it, kept in `cache` if that can be written and executed from."""
    reason = "there is no C compiler (cc, gcc, clang)"
    if compiler:
        try:
            return Library(_load_from_cache(compiler, cache) or _load_without_cache(compiler))
        except (OSError, subprocess.SubprocessError) as error:
            reason = f"{compiler} did not build the helper: {_told(error)}"
    logger.warning(
        "memory is mapped from Python, which is slower, and steps wait for calls that a thread makes beside "
        "them otherwise. The cause: %s. Remedy: install gcc and the C library's headers "
        "(Debian: apt-get install gcc libc6-dev), and start again",
        reason,
    )
    return None


def _load_from_cache(compiler: str, cache: Path | None) -> ctypes.CDLL | None:
    if cache is None:
        return None
    path = cache / f"native-{_digest(compiler)}.so"
    try:
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            # Several engines start at once: each builds a file of its own, and the last one stays.
            with tempfile.TemporaryDirectory(prefix=".native-", dir=cache) as folder:
                _build(compiler, Path(folder) / path.name).replace(path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):  # read-only, full, or mounted noexec
        return None


def _load_without_cache(compiler: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="ballonet-") as folder:
        return ctypes.CDLL(str(_build(compiler, Path(folder) / "native.so")))


def _build(compiler: str, target: Path) -> Path:
    sources = [str(_FOLDER / name) for name in _SOURCES if name.endswith(".c")]
    command = [compiler, *_FLAGS, "-o", str(target), *sources]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S)
    return target


def _digest(compiler: str) -> str:
    """Changes with the sources, the compiler, and what a home shared by several machines could differ in."""
    version = subprocess.run(
        [compiler, "--version"], check=True, capture_output=True, timeout=_BUILD_TIMEOUT_S
    )
    machine = (compiler, platform.machine(), *platform.libc_ver(), *_FLAGS)
    content = hashlib.sha256(version.stdout + repr(machine).encode())
    for name in _SOURCES:
        content.update((_FOLDER / name).read_bytes())
    return content.hexdigest()[:16]


def _told(error: Exception) -> str:
    said = getattr(error, "stderr", None)
    return " / ".join(str(said).splitlines()[:3]) if said else str(error)
