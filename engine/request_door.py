"""Where requests reach an engine's process past Ray: one socket, on which every ingress sends.

A call through Ray Serve's handle and the group's own to its engine take 6 ms on two quiet cores, this 0.5.
The call is made all the same: it is what Serve counts, drains and retries. See `engine.open_requests`.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections.abc import Sequence

import zmq
import zmq.asyncio

from engine.open_requests import OpenRequests
from engine.request_wire import DROP, OPEN, EngineAddress, decode_open
from engine.token_wire import SILENCE_S

logger = logging.getLogger(__name__)

_MAX_MESSAGE_BYTES = 64 << 20  # a prompt of 16 million tokens
_SILENCE_MS = int(SILENCE_S * 1000)


class RequestDoor:
    """The receiving end. For the event loop in which it is made.

    Args:
        host: an address of this node that ingresses on other nodes reach.
        requests: of this process.

    Attributes:
        door: what to tell the ingresses.
    """

    def __init__(self, host: str, requests: OpenRequests) -> None:
        self._requests = requests
        self._num_strange = 0
        self._socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        self._socket.ipv6 = ":" in host
        self._socket.maxmsgsize = _MAX_MESSAGE_BYTES
        self._socket.heartbeat_ivl = _SILENCE_MS // 5
        self._socket.heartbeat_timeout = _SILENCE_MS
        self._socket.bind(f"tcp://[{host}]:*" if ":" in host else f"tcp://{host}:*")
        address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.door = EngineAddress(address, secrets.token_bytes(16))
        self._task = asyncio.get_running_loop().create_task(self._receive())

    def close(self) -> None:
        """Stop listening."""
        self._task.cancel()
        self._socket.close(0)

    async def _receive(self) -> None:
        while True:
            _, *frames = await self._socket.recv_multipart()
            try:
                self._take(frames)
            except ValueError as error:
                self._num_strange += 1
                if self._num_strange.bit_count() == 1:  # 1, 2, 4, 8, ...: a flood must not fill the log
                    logger.warning("dropped %d messages that are no ingress': %s", self._num_strange, error)

    def _take(self, frames: Sequence[bytes]) -> None:
        secret, kind, *rest = frames if len(frames) >= 2 else (b"", b"")
        if not hmac.compare_digest(secret, self.door.secret):
            raise ValueError("wrong secret")
        if kind == OPEN and len(rest) == 2:
            self._requests.begin(*decode_open(*rest))
        elif kind == DROP and len(rest) == 1:
            self._requests.drop(rest[0].decode())
        else:
            raise ValueError(f"unknown kind {kind[:16]!r}")
