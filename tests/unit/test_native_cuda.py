"""How the native helper calls the CUDA driver, with functions in the driver's place that write it down."""

from __future__ import annotations

import ctypes
import logging
from typing import Any

import pytest
from cuda.bindings import driver

from engine.memory import native
from engine.memory.copies import Piece
from engine.memory.driver import ChunkDriver
from engine.memory.mapper import Call
from engine.memory.vmm import Move, Moved, Outcome

pytestmark = pytest.mark.skipif(native.load() is None, reason="no C compiler")

U64, SIZE, POINTER, INT = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
SIZES = ctypes.POINTER(SIZE)
CHUNK, MARGIN, OUT_OF_MEMORY = 2 << 20, 100 << 20, 2
SIGNATURES = {
    "set_current": ctypes.CFUNCTYPE(INT, POINTER),
    "create": ctypes.CFUNCTYPE(INT, ctypes.POINTER(U64), SIZE, POINTER, U64),
    "map": ctypes.CFUNCTYPE(INT, U64, SIZE, SIZE, U64, U64),
    "set_access": ctypes.CFUNCTYPE(INT, U64, SIZE, POINTER, SIZE),
    "unmap": ctypes.CFUNCTYPE(INT, U64, SIZE),
    "release": ctypes.CFUNCTYPE(INT, U64),
    "memory_info": ctypes.CFUNCTYPE(INT, SIZES, SIZES),
}
COPY = ctypes.CFUNCTYPE(INT, U64, U64, SIZE, POINTER)


class WrittenDown:
    """A CUDA driver that does nothing, tells what it was asked, and refuses what it is told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.answers: dict[str, int] = {}
        self.free_bytes = MARGIN + 64 * CHUNK
        self._last_handle = 0xF00D_0000_0000_0000
        self.functions = {name: kind(self._function(name)) for name, kind in SIGNATURES.items()}

    def _function(self, name: str) -> Any:
        def function(first: Any, *rest: Any) -> int:
            self.asked.append((name, *rest) if name in ("create", "memory_info") else (name, first, *rest))
            code = self.answers.pop(name, 0)
            if name == "create" and not code:
                self._last_handle += 1
                first[0] = self._last_handle
            if name == "memory_info":
                first[0] = self.free_bytes
            return code

        return function

    def vm(self) -> ChunkDriver:
        """A driver over these functions, as `CudaVirtualMemory` makes it."""
        addresses = {name: ctypes.cast(function, POINTER).value for name, function in self.functions.items()}
        cuda = native.CudaFunctions(
            **addresses, context=11, properties=22, access=33, chunk_bytes=CHUNK, margin_bytes=MARGIN
        )
        calls, library = native.CallTable(), native.load()
        assert library is not None
        library.quick.cuda_fill(ctypes.byref(cuda), ctypes.byref(calls))
        calls.owner = (cuda, self.functions)
        explain = Exception
        return ChunkDriver(CHUNK, native.NativeMapper(library, calls), explain)  # type: ignore[arg-type]


def test_every_call_gets_its_arguments() -> None:
    cuda = WrittenDown()
    vm = cuda.vm()
    handles = vm.create(2)
    assert handles == [0xF00D_0000_0000_0001, 0xF00D_0000_0000_0002], "64 bits, all of them"
    vm.map([16 * CHUNK, 17 * CHUNK], handles)
    assert vm.unmap([17 * CHUNK]) == 1
    assert vm.release(handles[1:]) == 1
    assert [name for name, *_ in cuda.asked].count("memory_info") == 1, "once a batch"
    del cuda.asked[0]
    assert cuda.asked == [
        ("create", CHUNK, 22, 0),
        ("create", CHUNK, 22, 0),
        ("map", 16 * CHUNK, CHUNK, 0, handles[0], 0),
        ("set_access", 16 * CHUNK, CHUNK, 33, 1),
        ("map", 17 * CHUNK, CHUNK, 0, handles[1], 0),
        ("set_access", 17 * CHUNK, CHUNK, 33, 1),
        ("unmap", 17 * CHUNK, CHUNK),
        ("release", handles[1]),
    ]
    vm.close()
    assert cuda.asked[-2:] == [("unmap", 16 * CHUNK, CHUNK), ("release", handles[0])]


def test_the_thread_has_the_context() -> None:
    cuda = WrittenDown()
    vm = cuda.vm()
    for _ in range(3):
        vm.collect(vm.submit([Move(5, CHUNK, 2 * CHUNK)]))
    assert cuda.asked[0] == ("set_current", 11)
    assert cuda.asked.count(("set_current", 11)) == 1
    assert cuda.asked[1:4] == [
        ("unmap", CHUNK, CHUNK),
        ("map", 2 * CHUNK, CHUNK, 0, 5, 0),
        ("set_access", 2 * CHUNK, CHUNK, 33, 1),
    ]


@pytest.mark.parametrize(("free", "made"), [(3 * CHUNK, 3), (3 * CHUNK - 1, 2), (0, 0), (-MARGIN, 0)])
def test_the_margin_is_left_alone(free: int, made: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    cuda = WrittenDown()
    cuda.free_bytes = MARGIN + free
    vm = cuda.vm()
    assert len(vm.create(4)) == made
    ends = vm.collect(vm.submit([Move(None, None, None)] * 4))
    assert [end.outcome for end in ends] == [Outcome.DONE] * made + [Outcome.NOT_MADE] * (4 - made)
    assert vm.num_calls + vm.num_calls_beside == 2 * made, "what is not asked of the driver is no call"
    assert repr(Call.MARGIN) in caplog.text
    assert all(record.levelno == logging.DEBUG for record in caplog.records), "the pool warns, not the driver"


def test_a_driver_that_hides_what_is_free_refuses_by_itself() -> None:
    cuda = WrittenDown()
    cuda.free_bytes = 0
    cuda.answers = {"memory_info": 3, "create": OUT_OF_MEMORY}
    assert cuda.vm().create(4) == []
    cuda.answers = {"memory_info": 3}
    assert len(cuda.vm().create(4)) == 4


def test_refused_access_is_unmapped_again() -> None:
    cuda = WrittenDown()
    vm = cuda.vm()
    cuda.answers = {"set_access": OUT_OF_MEMORY}
    assert vm.collect(vm.submit([Move(5, None, CHUNK)])) == [Moved(5, Outcome.UNMAPPED)]
    assert cuda.asked[-1] == ("unmap", CHUNK, CHUNK)


@pytest.mark.parametrize("count", [0, 1, 64, 65, 1000])
def test_copies_are_handed_over_in_their_order(count: int) -> None:
    """Beyond 64 the call is made without the interpreter's lock."""
    asked: list[tuple[Any, ...]] = []
    copy = COPY(lambda *arguments: asked.append(arguments) or 0)
    high = 0x7FF0_0000_0000_0000  # addresses and sizes have 64 bits, all of them used
    pieces = [Piece(high + index, high + 2 * index, (5 << 32) + index) for index in range(count)]
    assert issue(copy, pieces, stream=0x5EED_0000_0001) == 0
    assert asked == [(*piece, 0x5EED_0000_0001) for piece in pieces]


@pytest.mark.parametrize("count", [3, 100])
def test_no_copy_is_made_behind_a_refused_one(count: int) -> None:
    asked: list[int] = []

    def refuse_the_second(target: int, *_: Any) -> int:
        asked.append(target)
        return OUT_OF_MEMORY if target == 1 else 0

    copy = COPY(refuse_the_second)
    assert issue(copy, [Piece(target, 7, 8) for target in range(count)], stream=0) == OUT_OF_MEMORY
    assert asked == [0, 1]


def issue(copy: Any, pieces: list[Piece], stream: int) -> int:
    """Have copies made by a function in cuMemcpyDtoHAsync's place; the code."""
    library = native.load()
    assert library is not None
    return library.copy(ctypes.cast(copy, POINTER).value or 0, pieces, stream)


def test_structures_are_handed_over_as_the_driver_reads_them() -> None:
    """What `getPtr` points at is cuda.h's structure: type, handle types, location (type, device), ..."""
    properties = driver.CUmemAllocationProp()
    properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = 3
    words = (ctypes.c_int * 4).from_address(properties.getPtr())
    assert list(words) == [1, 0, 1, 3]
    access = driver.CUmemAccessDesc()
    access.location = properties.location
    access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    assert list((ctypes.c_int * 3).from_address(access.getPtr())) == [1, 3, 3]
    assert int(driver.CUcontext(7)) == 7
