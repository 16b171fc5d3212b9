"""The wire between the first rank and the others: Unix sockets, pickled tuples behind their length.

Ranks stand on one node, and the directory of the sockets belongs to the group, so nothing is authenticated
beyond its permissions. A socket rather than shared memory: it tells at once when a process at its other end
is gone, and wakes who waits for it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engine.errors import EngineDeadError
from engine.tp.place import RankPlace

JOIN_S = 300.0  # for processes that start: imports of torch on a busy machine take a minute
_BUFFER_BYTES = 1 << 20  # the largest step of usual sizes in one write

_LENGTH = struct.Struct("=Q")

Message = tuple[Any, ...]


class Link:
    """One end of a connection. Used by one thread at a time.

    Args:
        end: a connected stream socket, which is the link's from now on.
        name: of the other end, for errors.
    """

    def __init__(self, end: socket.socket, name: str) -> None:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
        end.setblocking(True)
        self._end = end
        self.name = name
        self._mail = select.poll()
        self._mail.register(end, select.POLLIN)
        self._buffer = bytearray(_BUFFER_BYTES)
        self._begin = self._filled = 0  # of what has come and was not taken yet

    def send(self, packed: bytes) -> None:
        """Raises EngineDeadError if the other end is gone."""
        parts = [_LENGTH.pack(len(packed)), packed]
        try:
            sent = self._end.sendmsg(parts)  # one call, mostly
            if sent < _LENGTH.size + len(packed):
                self._end.sendall(memoryview(b"".join(parts))[sent:])
        except OSError as error:
            raise self._lost(error) from None

    def has_mail(self, timeout_s: float | None = 0.0) -> bool:
        """Whether a message, or the end of the connection, is there within that time; None waits for it."""
        if self._begin < self._filled:
            return True
        if self._end.fileno() < 0:
            raise self._lost(OSError("closed on this side"))
        return bool(self._mail.poll(None if timeout_s is None else timeout_s * 1e3))

    def spin(self, seconds: float) -> None:
        """Wait that long for a message, awake: a core that sleeps takes some 100 us to wake."""
        until = time.monotonic() + seconds
        while not self.has_mail() and time.monotonic() < until:
            pass

    def receive(self, timeout_s: float | None = None) -> Message:
        """The next message.

        Raises:
            EngineDeadError: the other end is gone, or nothing came in time.
        """
        if timeout_s is not None and not self.has_mail(timeout_s):
            raise EngineDeadError(f"{self.name} has not answered for {timeout_s:.0f} s")
        (length,) = _LENGTH.unpack(self._take(_LENGTH.size))
        message: Message = pickle.loads(self._take(length))
        return message

    def close(self) -> None:
        """The other end hears of it."""
        self._end.close()

    def _take(self, count: int) -> memoryview:
        """The next bytes; they hold until the next call."""
        if self._begin == self._filled:
            self._begin = self._filled = 0
        if self._begin + count > len(self._buffer):
            left = self._buffer[self._begin : self._filled]
            self._buffer = left + bytearray(max(0, max(count, _BUFFER_BYTES) - len(left)))
            self._begin, self._filled = 0, len(left)
        while self._filled - self._begin < count:
            try:
                got = self._end.recv_into(memoryview(self._buffer)[self._filled :])
            except OSError as error:
                raise self._lost(error) from None
            if not got:
                raise self._lost(EOFError("its end of the connection is closed"))
            self._filled += got
        begin, self._begin = self._begin, self._begin + count
        return memoryview(self._buffer)[begin : self._begin]

    def _lost(self, error: Exception) -> EngineDeadError:
        return EngineDeadError(f"{self.name} is gone: {error or type(error).__name__}")


def pack(message: Message) -> bytes:
    """What `Link.send` takes: packed once for all ranks."""
    return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)


def accept(place: RankPlace, kinds: Sequence[str], timeout_s: float = JOIN_S) -> dict[str, list[Link]]:
    """For the first rank: the connections of every other rank, of each kind, in the order of ranks.

    Raises:
        EngineDeadError: somebody did not come in time.
    """
    found: dict[tuple[str, int], Link] = {}
    wanted = [(kind, rank) for kind in kinds for rank in range(1, place.size)]
    with socket.socket(socket.AF_UNIX) as door:
        with _within_reach(place.socket) as address:
            door.bind(address)
        door.listen(len(wanted))
        until = time.monotonic() + timeout_s
        while len(found) < len(wanted):
            door.settimeout(max(0.01, until - time.monotonic()))
            try:
                link = Link(door.accept()[0], "a rank that joins")
            except TimeoutError:
                missing = sorted({rank for _, rank in set(wanted) - set(found)})
                raise EngineDeadError(f"ranks {missing} did not start within {timeout_s:.0f} s") from None
            kind, rank = link.receive(timeout_s=JOIN_S)
            link.name = f"rank {rank}"
            found[kind, rank] = link
    return {kind: [found[kind, rank] for rank in range(1, place.size)] for kind in kinds}


def connect(place: RankPlace, kind: str, timeout_s: float = JOIN_S) -> Link:
    """For the other ranks: a connection to the first one.

    Raises:
        EngineDeadError: it does not listen within that time.
    """
    until = time.monotonic() + timeout_s
    while True:
        end = socket.socket(socket.AF_UNIX)
        try:
            with _within_reach(place.socket) as address:
                end.connect(address)
            break
        except OSError as error:
            end.close()
            if time.monotonic() > until:
                raise EngineDeadError(f"the first rank does not listen: {error}") from None
            time.sleep(0.02)
    link = Link(end, "the first rank")
    link.send(pack((kind, place.rank)))
    return link


@contextlib.contextmanager
def _within_reach(path: str) -> Iterator[str]:
    """Another name of a socket: the kernel takes 107 bytes at most, and TMPDIR may be longer."""
    directory = os.open(Path(path).parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{Path(path).name}"
    finally:
        os.close(directory)
