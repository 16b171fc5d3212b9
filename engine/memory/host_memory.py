"""How much memory the host has, and how much it could still give out, whichever limit is the tightest.

In a container the kernel's own figures are those of the whole machine: what ends a process there is the limit
of a control group, its own or one above it. Both versions of control groups are read.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_ROOT = Path("/")
_MARGIN = 8  # an eighth of the host's memory is left to everything else on it


class _Names(NamedTuple):
    """Where a version of control groups keeps its figures, below /sys/fs/cgroup."""

    folder: str
    limit: str
    usage: str
    reclaimable: str  # the line of memory.stat with the file cache that the kernel would drop first


_V1 = _Names("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Names("", "memory.max", "memory.current", "inactive_file")


def available_bytes(root: Path = _ROOT) -> int:
    """Memory that could still be given out. Touching more than that ends in the kernel killing somebody.

    Args:
        root: the folder that `proc` and `sys` are in.
    """
    return min(_meminfo(root)["MemAvailable"], *(limit - used for limit, used in _groups(root)), sys.maxsize)


def total_bytes(root: Path = _ROOT) -> int:
    """Memory that all processes under this one's limits can have together."""
    return min(_meminfo(root)["MemTotal"], *(limit for limit, _ in _groups(root)), sys.maxsize)


def room_bytes(root: Path = _ROOT) -> int:
    """What could be taken so that an eighth of the host's memory stays available; may be negative."""
    return available_bytes(root) - total_bytes(root) // _MARGIN


def _meminfo(root: Path) -> dict[str, int]:
    lines = (root / "proc/meminfo").read_text().splitlines()
    fields = (line.split() for line in lines)
    return {name.rstrip(":"): int(value) * 1024 for name, value, *_ in fields}


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of every group above this process that has a limit."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" or "memory" in controllers.split(","):
            names = _V2 if number == "0" else _V1
            mount = root / "sys/fs/cgroup" / names.folder
            # A container may see the path that its host knows, of which only the mount itself is there.
            group = mount / path.strip("/")
            for folder in (group, *group.parents):
                yield from _figures(folder, names)
                if folder == mount:
                    break


def _figures(folder: Path, names: _Names) -> Iterator[tuple[int, int]]:
    try:
        limit = (folder / names.limit).read_text().strip()
        if limit != "max":
            used = int((folder / names.usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield int(limit), used - int(stat.get(names.reclaimable, 0))
    except OSError:  # the root group has no limit, and a group of another namespace cannot be seen
        return
