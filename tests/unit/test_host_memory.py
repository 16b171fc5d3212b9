"""How much memory a host has, in machines and containers of every kind, as files of a made-up system."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.memory.host_memory import available_bytes, room_bytes, total_bytes

GIB = 1 << 30
NO_LIMIT = 9223372036854771712  # what version 1 says


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A machine of 64 GiB, 40 of them available, whose process is in no group."""
    write(
        tmp_path / "proc/meminfo",
        f"MemTotal: {64 << 20} kB\nMemAvailable: {40 << 20} kB\nHugePages_Free: 3\n",
    )
    write(tmp_path / "proc/self/cgroup", "0::/\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def group_v2(folder: Path, limit: object, used: int, cache: int = 0) -> None:
    write(folder / "memory.max", f"{limit}\n")
    write(folder / "memory.current", f"{used}\n")
    write(folder / "memory.stat", f"anon {used - cache}\ninactive_file {cache}\n")


def group_v1(folder: Path, limit: int, used: int, cache: int = 0) -> None:
    write(folder / "memory.limit_in_bytes", f"{limit}\n")
    write(folder / "memory.usage_in_bytes", f"{used}\n")
    write(folder / "memory.stat", f"inactive_file 5\ntotal_inactive_file {cache}\n")


def figures(host: Path) -> tuple[float, float, float]:
    """Available, total and room in GiB."""
    return available_bytes(host) / GIB, total_bytes(host) / GIB, room_bytes(host) / GIB


def test_a_bare_machine(host: Path) -> None:
    assert figures(host) == (40, 64, 32)


def test_a_container_that_sees_its_own_group_as_the_root(host: Path) -> None:
    group_v2(host / "sys/fs/cgroup", 16 * GIB, 10 * GIB, cache=2 * GIB)
    assert figures(host) == (8, 16, 6)


def test_the_tightest_group_above_counts(host: Path) -> None:
    write(host / "proc/self/cgroup", "0::/pods/one/engine\n")
    mount = host / "sys/fs/cgroup"
    group_v2(mount / "pods/one/engine", "max", 3 * GIB)
    group_v2(mount / "pods/one", 32 * GIB, 30 * GIB)
    group_v2(mount / "pods", 24 * GIB, 3 * GIB)
    assert figures(host) == (2, 24, -1)


def test_a_container_that_sees_the_path_of_its_host(host: Path) -> None:
    write(host / "proc/self/cgroup", "0::/kubepods/burstable/pod7\n")
    group_v2(host / "sys/fs/cgroup", 8 * GIB, 0)
    assert figures(host) == (8, 8, 7)


def test_version_1(host: Path) -> None:
    write(host / "proc/self/cgroup", "5:cpu,cpuacct:/a\n4:memory:/box/7\n1:name=systemd:/\n0::/\n")
    mount = host / "sys/fs/cgroup/memory"
    group_v1(mount, NO_LIMIT, 50 * GIB)
    group_v1(mount / "box/7", 4 * GIB, 2 * GIB, cache=GIB)
    assert figures(host) == (3, 4, 2.5)
    group_v1(mount / "box/7", NO_LIMIT, 2 * GIB)
    assert figures(host) == (40, 64, 32)


def test_this_machine() -> None:
    assert 0 < available_bytes() <= total_bytes()
