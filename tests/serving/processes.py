"""The processes of the Ray that this test session started, to be killed one by one."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import ray


def eventually(holds: Callable[[], bool], within_s: float = 60.0) -> float:
    """Waits until `holds`; the seconds it took. An exception of it counts as no."""
    started = time.monotonic()
    while True:
        try:
            if holds():
                return time.monotonic() - started
        except Exception:
            if time.monotonic() - started > within_s:
                raise
        assert time.monotonic() - started < within_s, "it did not happen in time"
        time.sleep(0.05)


def processes(title: str) -> set[int]:
    """Our descendants of that title: other sessions on this machine have processes like ours."""
    return {pid for pid in descendants(os.getpid()) if _title(pid).startswith(title)}


def descendants(ancestor: int) -> set[int]:
    """Process ids of children, their children, and so on; none that has ended."""
    parents = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if folder.name.isdigit():
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                parents[int(folder.name)] = 0 if state == "Z" else int(parent)
    found = {ancestor}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {ancestor}


def _title(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return ""


def kill(title: str) -> None:
    """kill -9 of the one process of that title."""
    (pid,) = processes(title)
    os.kill(pid, signal.SIGKILL)


def engines(deployment: str) -> dict[int, str]:
    """Process ids of the engine actors of one application's deployment, with the actors' names."""
    found = {}
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["name"].startswith(deployment) and actor["name"].endswith(":rank0"):
            try:
                handle = ray.get_actor(actor["name"], namespace=actor["namespace"])
                found[ray.get(handle.pid.remote(), timeout=10)] = actor["name"]
            except (ValueError, ray.exceptions.RayActorError):
                continue  # it has just ended
    return found
