"""Where tokens reach an ingress process: one socket, on which every engine sends past Ray.

Owns the numbers by which messages find their requests, and what each request has that is not read yet.
A stranger on the network cannot speak up: messages without this process' secret are dropped, and what is
in them is data, never code (`engine.token_wire`).
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import secrets

import zmq
import zmq.asyncio

from engine.messages import ReplyTo, TokenDelta
from engine.token_wire import SILENCE_S, Row, add, decode, to_delta

_log = logging.getLogger("ray.serve")

_MAX_MESSAGE_BYTES = 256 << 20  # far above what an engine sends; a stranger's may not fill the memory


class TokenStream:
    """The deltas of one request. Deltas that pile up become one; the reader sets the pace.

    It may be known by several numbers, one for each engine that may have been told to fill it; only one of
    them ever does.

    Attributes:
        reply_to: what to tell the engine.
    """

    def __init__(self, request_id: str, reply_to: ReplyTo, inbox: TokenInbox) -> None:
        self.reply_to = reply_to
        self._request_id = request_id
        self._inbox = inbox
        self._numbers = {reply_to.stream}
        self._has_been_read = False
        self._pending: Row | None = None
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def get(self) -> TokenDelta:
        """The next delta; what came before an error is read before it. For one reader.

        Raises:
            Exception: what `fail` was given.
        """
        while self._pending is None:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        row, self._pending = self._pending, None
        self._has_been_read = True
        return to_delta(row, self._request_id)

    def put(self, row: Row) -> None:
        """A delta has come."""
        if self._pending is None:
            self._pending = row
        else:
            add(self._pending, row)
        self._wake()

    def fail(self, error: Exception) -> None:
        """There will be no more deltas."""
        self._error = error
        self._wake()

    def another(self) -> ReplyTo:
        """One more number for it."""
        reply_to = self._inbox.number(self)
        self._numbers.add(reply_to.stream)
        return reply_to

    def renounce(self, number: int) -> bool:
        """What comes under that number is dropped, and what has come is forgotten.

        Returns False, and does nothing, if something was read.
        """
        if self._has_been_read:
            return False
        self._pending = None
        self._inbox.forget(number)
        return True

    def keep_only(self, number: int) -> None:
        """What comes under other numbers is dropped."""
        for other in self._numbers - {number}:
            self._inbox.forget(other)

    def close(self) -> None:
        """What comes from now on is dropped."""
        for number in self._numbers:
            self._inbox.forget(number)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class TokenInbox:
    """The receiving end of one process; for one event loop, in which the first `open` binds the socket.

    Args:
        host: an address of this node that engines on other nodes reach.
        silence_s: how long nothing at all may come from an engine's process, though it is asked five times: a
            connection that is cut would stay for ever.
    """

    def __init__(self, host: str, silence_s: float = SILENCE_S) -> None:
        self._host = host
        self._silence_ms = int(silence_s * 1000)
        self._secret = secrets.token_bytes(16)
        self._streams: dict[int, TokenStream] = {}
        self._numbers = itertools.count(1)
        self._socket: zmq.asyncio.Socket | None = None
        self._task: asyncio.Task[None] | None = None
        self._address = ""
        self._num_strange = 0

    def open(self, request_id: str) -> TokenStream:
        """A stream for one attempt at one request."""
        if self._socket is None:
            self._bind()
        reply_to = self._reply_to()
        self._streams[reply_to.stream] = stream = TokenStream(request_id, reply_to, self)
        return stream

    def number(self, stream: TokenStream) -> ReplyTo:
        """One more number for an open stream."""
        reply_to = self._reply_to()
        self._streams[reply_to.stream] = stream
        return reply_to

    def forget(self, number: int) -> None:
        """What comes under that number is dropped."""
        self._streams.pop(number, None)

    def close(self) -> None:
        """Stop listening."""
        if self._task is not None:
            self._task.cancel()
        if self._socket is not None:
            self._socket.close(0)

    def _bind(self) -> None:
        self._socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        self._socket.ipv6 = ":" in self._host
        self._socket.heartbeat_ivl = self._silence_ms // 5
        self._socket.heartbeat_timeout = self._silence_ms
        self._socket.maxmsgsize = _MAX_MESSAGE_BYTES
        host = f"[{self._host}]" if ":" in self._host else self._host
        self._socket.bind(f"tcp://{host}:*")
        self._address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._task = asyncio.get_running_loop().create_task(self._receive(self._socket))

    def _reply_to(self) -> ReplyTo:
        return ReplyTo(self._address, self._secret, next(self._numbers))

    async def _receive(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            sender, *frames = await socket.recv_multipart()
            try:
                secret, payload = frames
                if not hmac.compare_digest(secret, self._secret):
                    raise ValueError("wrong secret")
                for row in decode(payload):
                    if (stream := self._streams.get(row[0])) is not None:
                        stream.put(row)
            except ValueError as error:
                self._drop(error)
                continue
            # The receipt comes after the readers have been woken, so that the sender waits while they work.
            socket.send_multipart((sender, b""), zmq.NOBLOCK)

    def _drop(self, error: Exception) -> None:
        self._num_strange += 1
        if self._num_strange.bit_count() == 1:  # 1, 2, 4, 8, ...: a flood must not fill the log
            _log.warning("dropped %d messages that are no engine's: %s", self._num_strange, error)
