"""Host virtual memory really maps: aliasing, holes, hole punching, limits."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from engine.errors import ConfigError, DriverError
from engine.memory.host_vmm import HostVirtualMemory

CHUNK = 65536


def test_a_chunk_shows_at_every_address_it_is_mapped_to() -> None:
    vm = HostVirtualMemory(CHUNK, 8)
    base = vm.reserve(4)
    one, two = vm.create(), vm.create()
    vm.map(base, [one, two])
    vm.map(base + 3 * CHUNK, [one])
    view = vm.view(base, 4)
    view[0] = 7
    view[CHUNK] = 9
    assert view[3 * CHUNK] == 7
    assert view[CHUNK] == 9


def test_content_stays_with_the_chunk_when_it_moves() -> None:
    vm = HostVirtualMemory(CHUNK, 8)
    base = vm.reserve(4)
    chunk = vm.create()
    vm.map(base, [chunk])
    view = vm.view(base, 4)
    view[:CHUNK] = 5
    vm.unmap(base, 1)
    vm.map(base + 2 * CHUNK, [chunk])
    assert bool((view[2 * CHUNK : 3 * CHUNK] == 5).all())


def test_a_released_chunk_gives_its_memory_back_and_returns_as_zeros() -> None:
    vm = HostVirtualMemory(1 << 20, 8)
    base = vm.reserve(1)
    chunk = vm.create()
    vm.map(base, [chunk])
    vm.view(base, 1).fill_(3)
    blocks = os.fstat(vm._file).st_blocks
    vm.unmap(base, 1)
    vm.release(chunk)
    assert os.fstat(vm._file).st_blocks < blocks
    vm.map(base, [vm.create()])
    assert int(vm.view(base, 1).max()) == 0


def test_a_view_works_over_a_mostly_unmapped_range_of_a_terabyte() -> None:
    vm = HostVirtualMemory(CHUNK, 8)
    rows = (1 << 40) // CHUNK
    base = vm.reserve(rows)
    vm.map(base + (rows - 1) * CHUNK, [vm.create()])
    view = vm.view(base, rows).view(torch.float32)
    view[-1] = 2.5
    assert float(view[-1]) == 2.5


def test_touching_a_hole_is_a_fault_and_not_silent() -> None:
    code = (
        "from engine.memory.host_vmm import HostVirtualMemory\n"
        f"vm = HostVirtualMemory({CHUNK}, 8)\nbase = vm.reserve(2)\nvm.map(base, [vm.create()])\n"
        f"print(int(vm.view(base, 2)[{CHUNK}]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode < 0
    assert result.stdout == ""


def test_a_refused_map_leaves_nothing_mapped() -> None:
    vm = HostVirtualMemory(CHUNK, 8)
    base = vm.reserve(4)
    good = vm.create()
    with pytest.raises(DriverError, match="mmap"):
        vm.map(base, [good, -1])  # no such offset
    vm.map(base, [good])
    vm.view(base, 1).fill_(1)


def test_limits_are_explained() -> None:
    with pytest.raises(ConfigError, match="multiple of"):
        HostVirtualMemory(1000, 8)
    with pytest.raises(ConfigError, match="raise memory.chunk_bytes"):
        HostVirtualMemory(CHUNK, 10_000_000)


def test_close_returns_the_address_space() -> None:
    vm = HostVirtualMemory(CHUNK, 8)
    base = vm.reserve(4)
    vm.map(base, [vm.create()])
    with open("/proc/self/maps") as maps:
        assert f"{base:x}" in maps.read()
    vm.close()
    with open("/proc/self/maps") as maps:
        assert f"{base:x}-" not in maps.read()
