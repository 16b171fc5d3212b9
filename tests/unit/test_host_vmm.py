"""Host virtual memory really maps: aliasing, holes, hole punching, limits. In C and from Python alike."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from engine.errors import ConfigError, DriverError
from engine.memory import native
from engine.memory.host_vmm import HostVirtualMemory
from engine.memory.vmm import Move, Moved, Outcome

CHUNK = 65536

Make = Callable[..., HostVirtualMemory]


@pytest.fixture(params=["native", "python"])
def make_vm(request: pytest.FixtureRequest) -> Iterator[Make]:
    if request.param == "native" and native.load() is None:
        pytest.skip("no C compiler")
    made: list[HostVirtualMemory] = []

    def make(chunk_bytes: int = CHUNK, max_chunks: int = 8) -> HostVirtualMemory:
        made.append(HostVirtualMemory(chunk_bytes, max_chunks, use_native=request.param == "native"))
        return made[-1]

    yield make
    for vm in made:
        vm.close()


def places(base: int, *rows: int) -> list[int]:
    """Addresses of rows of a range."""
    return [base + row * CHUNK for row in rows]


def num_mapped(vm: HostVirtualMemory) -> int:
    """Mappings of the driver's file, as Linux counts them."""
    inode = f" {os.fstat(vm._file.fileno()).st_ino} "
    with open("/proc/self/maps") as maps:
        return sum(inode in line and "memfd" in line for line in maps)


def is_mapped(address: int) -> bool:
    """Whether a mapping begins there."""
    with open("/proc/self/maps") as maps:
        return any(line.startswith(f"{address:x}-") for line in maps)


def max_mappings() -> int:
    """What Linux allows a process."""
    with open("/proc/sys/vm/max_map_count") as file:
        limit = int(file.read())
    if limit > 1 << 18:
        pytest.skip(f"vm.max_map_count is {limit}: that many mappings would take minutes")
    return limit


def test_a_chunk_shows_at_every_address_it_is_mapped_to(make_vm: Make) -> None:
    vm = make_vm()
    base = vm.reserve(4)
    one, two = vm.create(2)
    vm.map(places(base, 0, 1, 3), [one, two, one])
    view = vm.view(base, 4)
    view[0] = 7
    view[CHUNK] = 9
    assert view[3 * CHUNK] == 7
    assert view[CHUNK] == 9


def test_content_stays_with_the_chunk_when_it_moves(make_vm: Make) -> None:
    vm = make_vm()
    base = vm.reserve(4)
    chunks = vm.create(1)
    vm.map([base], chunks)
    view = vm.view(base, 4)
    view[:CHUNK] = 5
    assert vm.unmap([base]) == 1
    vm.map(places(base, 2), chunks)
    assert bool((view[2 * CHUNK : 3 * CHUNK] == 5).all())


def test_submitted_moves_end_in_their_order(make_vm: Make) -> None:
    vm = make_vm()
    base = vm.reserve(4)
    (chunk,) = vm.create(1)
    vm.map([base], [chunk])
    view = vm.view(base, 4)
    view[:CHUNK] = 5
    first = vm.submit([Move(chunk, base, base + CHUNK), Move(None, None, base)])
    second = vm.submit([Move(chunk, base + CHUNK, None), Move(chunk, None, base + 3 * CHUNK)])
    assert vm.collect(second) == [Moved(chunk, Outcome.DONE)] * 2
    assert vm.is_done(first)
    moved, made = vm.collect(first)
    assert moved == Moved(chunk, Outcome.DONE)
    assert made.outcome is Outcome.DONE
    assert int(view[3 * CHUNK]) == 5
    assert int(view[:CHUNK].max()) == 0, "a new chunk where the old one was"
    assert vm.release([made.handle or 0]) == 0, "it is mapped"


def test_a_released_chunk_gives_its_memory_back_and_returns_as_zeros(make_vm: Make) -> None:
    vm = make_vm(1 << 20)
    base = vm.reserve(1)
    chunks = vm.create(1)
    vm.map([base], chunks)
    vm.view(base, 1).fill_(3)
    blocks = os.fstat(vm._file.fileno()).st_blocks
    vm.unmap([base])
    assert vm.release(chunks) == 1
    assert os.fstat(vm._file.fileno()).st_blocks < blocks
    vm.map([base], vm.create(1))
    assert int(vm.view(base, 1).max()) == 0


def test_a_view_works_over_a_mostly_unmapped_range_of_a_terabyte(make_vm: Make) -> None:
    vm = make_vm()
    rows = (1 << 40) // CHUNK
    base = vm.reserve(rows)
    vm.map(places(base, rows - 1), vm.create(1))
    view = vm.view(base, rows).view(torch.float32)
    view[-1] = 2.5
    assert float(view[-1]) == 2.5


@pytest.mark.parametrize("use_native", [True, False])
def test_touching_a_hole_is_a_fault_and_not_silent(use_native: bool) -> None:
    code = (
        "from engine.memory.host_vmm import HostVirtualMemory\n"
        f"vm = HostVirtualMemory({CHUNK}, 8, {use_native})\n"
        "base = vm.reserve(2)\nvm.map([base], vm.create(1))\n"
        f"print(int(vm.view(base, 2)[{CHUNK}]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode < 0
    assert result.stdout == ""


def test_a_refused_map_leaves_nothing_mapped(make_vm: Make) -> None:
    vm = make_vm()
    base = vm.reserve(4)
    one, two = vm.create(2)
    with pytest.raises(DriverError, match="mmap"):
        vm.map(places(base, 0, 1, 2), [one, two, 1 << 40])  # no such chunk
    assert num_mapped(vm) == 0
    vm.map(places(base, 0, 1), [one, two])
    vm.view(base, 2).fill_(1)


def test_it_is_as_strict_as_a_gpu(make_vm: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Linux would replace a mapping, unmap nothing and punch a hole into a mapped chunk without a word."""
    vm = make_vm()
    base = vm.reserve(4)
    one, two, three = vm.create(3)
    vm.map(places(base, 0, 1), [one, two])
    with pytest.raises(DriverError, match="File exists"):
        vm.map(places(base, 1), [three])
    with pytest.raises(DriverError, match="Invalid"):
        vm.map([base + 8 * CHUNK], [three])  # outside every range
    assert vm.unmap(places(base, 0, 2, 1)) == 1
    assert vm.release([one, two, three]) == 1
    with pytest.raises(DriverError, match="Invalid"):
        vm.map(places(base, 2), [one])  # released
    taken = vm.submit([Move(three, None, base + CHUNK), Move(three, base + 3 * CHUNK, base + 2 * CHUNK)])
    assert [moved.outcome for moved in vm.collect(taken)] == [Outcome.UNMAPPED, Outcome.STAYED]
    assert "unmap ended after 1 of 3 chunks" in caplog.text
    assert "release ended after 1 of 3 chunks" in caplog.text
    assert "2 of 2 moves were refused" in caplog.text


def test_no_more_chunks_than_there_are(make_vm: Make, caplog: pytest.LogCaptureFixture) -> None:
    vm = make_vm()
    base = vm.reserve(4)
    chunks = vm.create(10)
    assert len(set(chunks)) == 8
    assert "create ended after 8 of 10 chunks: memfd failed" in caplog.text
    assert vm.collect(vm.submit([Move(None, None, base)])) == [Moved(None, Outcome.NOT_MADE)]
    assert num_mapped(vm) == 0
    vm.release(chunks[3:5])
    assert sorted(vm.create(3)) == chunks[3:5]


def test_calls_are_counted_one_a_chunk(make_vm: Make) -> None:
    vm = make_vm()
    base = vm.reserve(4)
    chunks = vm.create(3)
    vm.map(places(base, 0, 1), chunks[:2])
    vm.unmap([base])
    vm.release(chunks[2:])
    assert (vm.num_calls, vm.num_calls_beside) == (7, 0)
    vm.collect(vm.submit([Move(chunks[1], base + CHUNK, base), Move(None, None, base + CHUNK)]))
    beside = vm.num_calls_beside
    assert vm.num_calls + beside == 11
    assert beside in (0, 4), "all by the thread, or all at once where there is none"
    vm.close()
    assert vm.num_calls_beside == beside


def test_limits_are_explained() -> None:
    with pytest.raises(ConfigError, match="multiple of"):
        HostVirtualMemory(1000, 8)
    with pytest.raises(ConfigError, match="raise memory.chunk_bytes"):
        HostVirtualMemory(CHUNK, 10_000_000)


def test_places_are_limited_before_linux_is_out_of_mappings(make_vm: Make) -> None:
    """One chunk at every second place costs two mappings each, however few chunks there are."""
    limit = max_mappings()
    vm = make_vm(4096, 1)
    base = vm.reserve(limit)
    addresses = [base + 2 * index * 4096 for index in range(limit // 2)]
    with pytest.raises(DriverError, match="Cannot allocate memory"):
        vm.map(addresses, vm.create(1) * len(addresses))
    fewer = addresses[: limit // 8]
    vm.map(fewer, [0] * len(fewer))
    assert vm.unmap(fewer) == len(fewer)


def test_mappings_that_others_made_are_counted(make_vm: Make) -> None:
    limit = max_mappings()
    crowd = mmap.mmap(-1, 4096 * limit, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(0, 3 * limit // 5, 2):  # each page that differs costs itself and the one behind it
        crowd.madvise(mmap.MADV_DONTDUMP, page * 4096, 4096)
    vm = make_vm(4096, 1)
    base = vm.reserve(limit)
    addresses = [base + 2 * index * 4096 for index in range(limit // 4)]
    with pytest.raises(DriverError, match="Cannot allocate memory"):
        vm.map(addresses, vm.create(1) * len(addresses))
    assert num_mapped(vm) == 0, "and nothing of it stays"
    with pytest.raises(ConfigError, match="raise memory.chunk_bytes"):
        make_vm(4096, limit // 4)
    crowd.close()


@pytest.mark.parametrize("use_native", [True, False])
def test_memory_goes_back_when_nobody_refers_to_it(use_native: bool) -> None:
    """A view is a reference: what it shows stays mapped."""
    vm = HostVirtualMemory(CHUNK, 8, use_native)
    base = vm.reserve(2)
    vm.map([base], vm.create(1))
    ticket = vm.submit([Move(None, None, base + CHUNK)])
    while not vm.is_done(ticket):
        time.sleep(0.001)  # before that a write ends the process
    view = vm.view(base, 2)[CHUNK:]
    del vm
    view[5] = 7
    assert view[5] == 7
    del view
    assert not is_mapped(base)


@pytest.mark.parametrize("use_native", [True, False])
def test_what_a_forked_child_drops_stays_its_parents(use_native: bool) -> None:
    vm = HostVirtualMemory(CHUNK, 8, use_native)
    base = vm.reserve(1)
    vm.map([base], vm.create(1))
    vm.view(base, 1)[0] = 7
    if not (child := os.fork()):
        del vm
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert vm.view(base, 1)[0] == 7


def test_close_returns_the_address_space(make_vm: Make) -> None:
    vm = make_vm()
    base = vm.reserve(4)
    vm.map([base], vm.create(1))
    vm.submit([Move(None, None, base + CHUNK)])
    assert is_mapped(base)
    vm.close()
    vm.close()
    assert not is_mapped(base)
