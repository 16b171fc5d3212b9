"""Host chunks from one engine's balloon to another's: through shared memory on one node, by a stream else.

The receiver opens a door: a ZMQ socket, and a window of a few chunks in shared memory. A sender that finds
the window copies chunks into it, and says by the socket that they are there; one that does not is on another
node, and sends them along. Either way a window of chunks is under way at a time, each of which the receiver
acknowledges once it lies in its balloon: memory is bounded, and whoever is slower sets the pace.

Messages carry the receiver's secret, and nothing in them is executed. Bytes are not encrypted.
"""

from __future__ import annotations

import contextlib
import ctypes
import hmac
import mmap
import os
import secrets
import struct
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import zmq

from engine.errors import DriverError
from engine.memory.copies import Ticket
from engine.migration import Door

_WINDOW_BYTES = 32 << 20  # 16 chunks of 2 MiB: enough for a round trip of some ms at 10 GiB/s
_STALL_S = 10.0  # without a chunk, or without a receipt
_LOOK_MS = 50  # between two looks at whether the transfer is still wanted
_HEARTBEAT_MS = 2_000
_INDEX = struct.Struct("=Q")
_HEADER_BYTES = mmap.PAGESIZE  # of the window: the secret, by which a sender knows that it is the same memory


class Transfer(Ticket, Protocol):
    """Chunks under way between two engines."""

    def cancel(self) -> None:
        """They are not wanted any more: the transfer ends soon, with an error. Never waits."""


class KvTransport(Protocol):
    """Opens doors and sends through them, on all ranks of an engine. Used by one thread."""

    def listen(self, addresses: Sequence[int]) -> tuple[tuple[Door, ...], Transfer]:
        """A door a rank, through which chunks come to these addresses, in this order.

        Raises:
            DriverError: there is no socket to be had.
        """

    def send(self, doors: Sequence[Door], addresses: Sequence[int]) -> Transfer:
        """Send the chunks at these addresses, each rank's through its door. They must stay until the end."""


class KvStreams:
    """Implements `KvTransport` for one rank.

    Args:
        host: address of this node by which others reach it.
        chunk_bytes: size of a chunk.
        shares_memory: offer the window in shared memory, and use another's.
        stall_s: how long to wait for the other side.
    """

    def __init__(
        self, host: str, chunk_bytes: int, shares_memory: bool = True, stall_s: float = _STALL_S
    ) -> None:
        self._host = host
        self._chunk_bytes = chunk_bytes
        self._shares_memory = shares_memory
        self._stall_s = stall_s

    def listen(self, addresses: Sequence[int]) -> tuple[tuple[Door, ...], Transfer]:
        window = max(1, min(len(addresses), _WINDOW_BYTES // self._chunk_bytes))
        receiver = _Receiver(self._host, self._chunk_bytes, addresses, window, self._shares_memory)
        return (receiver.door,), _Running(lambda job: receiver.run(job, self._stall_s))

    def send(self, doors: Sequence[Door], addresses: Sequence[int]) -> Transfer:
        sender = _Sender(doors[0], self._chunk_bytes, addresses, self._shares_memory)
        return _Running(lambda job: sender.run(job, self._stall_s))


class _Running:
    """A transfer in a thread of its own. Implements `Transfer`."""

    def __init__(self, work: Callable[[_Running], None]) -> None:
        self.is_cancelled = False
        self._work = work
        self._has_ended = threading.Event()
        self._reason: str | None = None
        threading.Thread(target=self._run, name="ballonet-migration", daemon=True).start()

    @property
    def is_done(self) -> bool:
        return self._has_ended.is_set()

    def wait(self) -> None:
        self._has_ended.wait()
        if self._reason is not None:
            raise DriverError("KV transfer", self._reason)

    def cancel(self) -> None:
        self.is_cancelled = True

    def _run(self) -> None:
        try:
            self._work(self)
        except Exception as error:  # a thread has nobody to raise to
            self._reason = str(error) or type(error).__name__
        self._has_ended.set()


class _Silence:
    """Waits for a socket, but not for ever."""

    def __init__(self, socket: zmq.Socket[bytes], job: _Running, stall_s: float, other: str) -> None:
        self._socket, self._job, self._stall_s, self._other = socket, job, stall_s, other

    def wait(self) -> None:
        """Return when a message is there.

        Raises:
            TimeoutError: none has come for long.
            InterruptedError: the transfer was cancelled.
        """
        left_ms = self._stall_s * 1e3
        while not self._job.is_cancelled:
            if self._socket.poll(min(_LOOK_MS, max(1, int(left_ms)))):
                return
            left_ms -= _LOOK_MS
            if left_ms <= 0:
                raise TimeoutError(f"the {self._other} has been silent for {self._stall_s:g} s")
        raise InterruptedError("it was cancelled")


class _Receiver:
    """The door of one rank, and who takes in what comes through it."""

    def __init__(
        self, host: str, chunk_bytes: int, addresses: Sequence[int], window: int, shares_memory: bool
    ) -> None:
        self._chunk_bytes = chunk_bytes
        self._addresses = addresses
        self._secret = secrets.token_bytes(16)
        self._window = _Window.make(window, chunk_bytes, self._secret) if shares_memory else None
        self._socket = _socket(zmq.ROUTER)
        try:
            self._socket.ipv6 = ":" in host
            self._socket.maxmsgsize = chunk_bytes
            self._socket.rcvhwm = window + 1
            self._socket.heartbeat_ivl = _HEARTBEAT_MS
            bound = f"[{host}]" if ":" in host else host
            self._socket.bind(f"tcp://{bound}:*")
        except zmq.ZMQError as error:
            self._close()
            raise DriverError("zmq_bind", str(error)) from None
        path = "" if self._window is None else self._window.path
        address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.door = Door(address, self._secret, path, window)

    def run(self, job: _Running, stall_s: float) -> None:
        """Take in all chunks, in their order."""
        silence = _Silence(self._socket, job, stall_s, "source")
        try:
            at = 0
            while at < len(self._addresses):
                silence.wait()
                who, *frames = self._socket.recv_multipart(copy=False)
                if not self._is_ours(frames):
                    continue
                self._put(at, frames)
                at += 1
                if self._window is not None:
                    self._window.unlink()  # the sender has it by now, or never will
                self._socket.send_multipart((who, _INDEX.pack(at)))
        finally:
            self._close()

    def _is_ours(self, frames: Sequence[zmq.Frame]) -> bool:
        return len(frames) == 3 and hmac.compare_digest(frames[0].bytes, self._secret)

    def _put(self, at: int, frames: Sequence[zmq.Frame]) -> None:
        """Raises ValueError for what no sender of ours says."""
        target, payload = self._addresses[at], frames[2].buffer
        if frames[1].bytes != _INDEX.pack(at):
            raise ValueError("chunks have come in another order than they were sent")
        if payload.nbytes == self._chunk_bytes:
            source = int(np.frombuffer(payload, np.uint8).ctypes.data)
        elif payload.nbytes == 0 and self._window is not None:
            source = self._window.address_of(at)
        else:
            raise ValueError(f"a chunk of {payload.nbytes} bytes has come")
        ctypes.memmove(target, source, self._chunk_bytes)

    def _close(self) -> None:
        # The last receipt still goes out.
        self._socket.close(1_000)
        if self._window is not None:
            self._window.unlink()
            self._window.close()


class _Sender:
    """One rank's chunks, on their way through a door."""

    def __init__(self, door: Door, chunk_bytes: int, addresses: Sequence[int], shares_memory: bool) -> None:
        self._door = door
        self._chunk_bytes = chunk_bytes
        self._addresses = addresses
        self._window = _Window.find(door, chunk_bytes) if shares_memory else None
        self._trackers: list[zmq.MessageTracker] = []

    def run(self, job: _Running, stall_s: float) -> None:
        """Send all chunks, and return when all are acknowledged."""
        socket = _socket(zmq.DEALER)
        socket.ipv6 = True
        socket.copy_threshold = 0  # what is sent is read from the balloon itself
        socket.heartbeat_ivl = _HEARTBEAT_MS
        silence = _Silence(socket, job, stall_s, "target")
        try:
            socket.connect(self._door.address)
            num_sent = num_there = 0
            while num_there < len(self._addresses):
                while num_sent < min(len(self._addresses), num_there + self._door.window):
                    self._send(socket, num_sent)
                    num_sent += 1
                silence.wait()
                (num_there,) = _INDEX.unpack(socket.recv())
        finally:
            socket.close(0)
            for tracker in self._trackers:  # nobody may reuse a chunk that a socket still reads
                tracker.wait(timeout=stall_s)
            if self._window is not None:
                self._window.close()

    def _send(self, socket: zmq.Socket[bytes], at: int) -> None:
        source = self._addresses[at]
        head = self._door.secret, _INDEX.pack(at)
        if self._window is not None:
            ctypes.memmove(self._window.address_of(at), source, self._chunk_bytes)
            socket.send_multipart((*head, b""))
            return
        socket.send_multipart(head, zmq.SNDMORE)
        chunk = (ctypes.c_char * self._chunk_bytes).from_address(source)
        tracker = socket.send(memoryview(chunk), copy=False, track=True)
        self._trackers = [one for one in self._trackers if not one.done]
        if tracker is not None:
            self._trackers.append(tracker)


def _socket(kind: int) -> zmq.Socket[bytes]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    return context.socket(kind)


class _Window:
    """Shared memory for a few chunks. Its file has a name only until the sender has found it."""

    def __init__(self, path: str, memory: mmap.mmap, count: int, chunk_bytes: int) -> None:
        self.path = path
        self._memory = memory
        self._count = count
        self._chunk_bytes = chunk_bytes
        self._view = ctypes.c_char.from_buffer(memory)
        self._is_linked = True

    @classmethod
    def make(cls, count: int, chunk_bytes: int, secret: bytes) -> _Window | None:
        """None where there is no shared memory for it, as in a container that was given little."""
        path = f"/dev/shm/ballonet-{secrets.token_hex(16)}"
        nbytes = _HEADER_BYTES + count * chunk_bytes
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError:
            return None
        try:
            os.posix_fallocate(file, 0, nbytes)  # or whoever writes to it first would be killed
            memory = mmap.mmap(file, nbytes)
        except OSError:
            Path(path).unlink()
            return None
        finally:
            os.close(file)
        memory[: len(secret)] = secret
        return cls(path, memory, count, chunk_bytes)

    @classmethod
    def find(cls, door: Door, chunk_bytes: int) -> _Window | None:
        """The receiver's; None on another node, or where its memory is not ours."""
        nbytes = _HEADER_BYTES + door.window * chunk_bytes
        try:
            file = os.open(door.shared_path, os.O_RDWR | os.O_NOFOLLOW) if door.shared_path else -1
        except OSError:
            return None
        if file < 0:
            return None
        try:
            memory = mmap.mmap(file, nbytes)
        except (OSError, ValueError):
            return None
        finally:
            os.close(file)
        if not hmac.compare_digest(memory[: len(door.secret)], door.secret):
            memory.close()
            return None
        return cls(door.shared_path, memory, door.window, chunk_bytes)

    def address_of(self, at: int) -> int:
        """Where the chunk of that number is put down."""
        return ctypes.addressof(self._view) + _HEADER_BYTES + at % self._count * self._chunk_bytes

    def unlink(self) -> None:
        """Nobody else may find it."""
        if self._is_linked:
            self._is_linked = False
            with contextlib.suppress(FileNotFoundError):
                Path(self.path).unlink()

    def close(self) -> None:
        """Give the memory back."""
        del self._view
        self._memory.close()
