"""The processes of the Ray that this test session started, to be killed one by one."""

from __future__ import annotations

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
    parents, found = {}, set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text()
                words = (folder / "cmdline").read_bytes().rstrip(b"\0 ").decode(errors="replace")
            except OSError:
                continue  # it has ended meanwhile
            state, parent = stat.rpartition(")")[2].split()[:2]
            parents[int(folder.name)] = int(parent)
            if words.startswith(title) and state != "Z":
                found.add(int(folder.name))
    return {pid for pid in found if _descends(pid, parents)}


def _descends(pid: int, parents: dict[int, int]) -> bool:
    while pid > 1 and pid != os.getpid():
        pid = parents.get(pid, 0)
    return pid == os.getpid()


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
