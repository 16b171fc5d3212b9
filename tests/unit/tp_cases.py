"""Ranks in threads of one process, where a TP group's parts can be taken apart."""

from __future__ import annotations

import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.tp.place import RankPlace
from engine.tp.wire import Link

PATIENCE_S = 60.0


class _Meeting:
    """Where the threads of one group exchange tensors."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.tensors: dict[int, torch.Tensor] = {}

    def exchange(self, rank: int, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all ranks, in their order. Nobody goes on before all have taken them."""
        self.tensors[rank] = tensor.clone()
        self.barrier.wait(PATIENCE_S)
        found = [self.tensors[one] for one in sorted(self.tensors)]
        self.barrier.wait(PATIENCE_S)
        return found


class ThreadGroup:
    """The shape of `RankGroup`, for threads."""

    _meetings: dict[Path, _Meeting] = {}
    _lock = threading.Lock()

    def __init__(self, rank: int, size: int, store: Path, device: torch.device) -> None:
        self.rank, self.size = rank, size
        with self._lock:
            self._meeting = self._meetings.setdefault(store, _Meeting(size))

    def sum(self, tensor: torch.Tensor) -> None:
        tensor.copy_(torch.stack(self._meeting.exchange(self.rank, tensor)).sum(0))

    def spread(self, tensor: torch.Tensor) -> None:
        tensor.copy_(self._meeting.exchange(self.rank, tensor)[0])

    def join(self, part: torch.Tensor, parts: torch.Tensor) -> None:
        parts.copy_(torch.stack(self._meeting.exchange(self.rank, part)).view(parts.shape))


def pair() -> tuple[Link, Link]:
    """Both ends of a link."""
    first, second = socket.socketpair(socket.AF_UNIX)
    return Link(first, "the other rank"), Link(second, "the first rank")


def places(size: int) -> list[RankPlace]:
    """A group that meets in a directory of its own."""
    directory = tempfile.mkdtemp(prefix="ranks-")
    return [RankPlace(rank, size, directory) for rank in range(size)]


@contextmanager
def followers_in_threads(config: EngineConfig) -> Iterator[RankPlace]:
    """All ranks of a group but the first, whose place is given; they have ended when the block has."""
    from engine.tp.follower import follow

    first, *others = places(config.tensor_parallel_size)
    threads = [run(lambda place=place: follow(config, place, ThreadGroup)) for place in others]  # type: ignore[misc]
    yield first
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "a rank has not ended with the first one"


def run(work: Callable[[], object]) -> threading.Thread:
    """Do that in a thread."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread
