"""Deltas from an engine's process to the ingresses: one message a step and ingress, past Ray.

Owns a connection to each ingress that asked for tokens, and what its requests have that is not sent yet.
An ingress acknowledges every message, and only a few may be without a receipt: what comes meanwhile piles
up as one delta a request, so a slow ingress gets fewer, larger messages and costs no memory a step. One
that is gone, or acknowledges nothing for long, loses its requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from engine.errors import EngineDeadError
from engine.messages import ReplyTo, TokenDelta
from engine.migration import Migrated
from engine.token_wire import SILENCE_S, encode, weight

logger = logging.getLogger(__name__)

MESSAGES_AHEAD = 4  # without a receipt: a step takes longer than the way there and back
_MAX_WEIGHT = 1 << 20  # numbers in a message, about 8 MB
_LINGER_MS = 2_000  # the last words of an engine that ends
STALL_S = 30.0  # an ingress whose event loop stands still for so long serves nobody


class TokenSender:
    """The sending end. Everything but the constructor is for one event loop.

    Args:
        cancel: called with the id of a request whose ingress is gone.
        stall_s: how long an ingress may leave messages without a receipt.
        silence_s: how long nothing at all may come from an ingress' process, though it is asked five times.
    """

    def __init__(
        self, cancel: Callable[[str], None], stall_s: float = STALL_S, silence_s: float = SILENCE_S
    ) -> None:
        self._cancel = cancel
        self._stall_s = stall_s
        self._silence_s = silence_s
        self._peers: dict[str, _Peer] = {}
        self._routes: dict[str, _Route] = {}

    def open(self, request_id: str, reply_to: ReplyTo) -> asyncio.Future[Migrated | None]:
        """From now on the request's deltas go there. The result comes when the last one has been sent: None,
        or where the request goes on.

        The future raises EngineDeadError if the ingress is gone, and what `fail` was given.
        """
        peer = self._peers.get(reply_to.address)
        if peer is None:
            peer = _Peer(reply_to, self._stall_s, self._silence_s, self._lost)
            self._peers[reply_to.address] = peer
        route = _Route(peer, reply_to.stream, asyncio.get_running_loop().create_future())
        self._routes[request_id] = route
        return route.ended

    def is_open(self, request_id: str) -> bool:
        """Whether deltas of that request are waited for."""
        return request_id in self._routes

    def close(self, request_id: str) -> None:
        """Nobody waits for this request any more; what it has that is not sent is dropped."""
        route = self._routes.pop(request_id, None)
        if route is not None:
            route.peer.pending.pop(request_id, None)
            route.ended.cancel()

    def put(self, deltas: Iterable[TokenDelta]) -> None:
        """Send these as soon as their ingresses take them. What belongs to no open request is dropped."""
        touched: dict[_Peer, None] = {}
        for delta in deltas:
            if (route := self._routes.get(delta.request_id)) is not None:
                route.peer.add(delta, route)
                touched[route.peer] = None
        for peer in touched:
            peer.flush()

    def fail(self, request_id: str, error: Exception) -> None:
        """End a request with an error instead of a delta."""
        if (route := self._routes.get(request_id)) is not None and not route.ended.done():
            route.ended.set_exception(error)

    async def acknowledged(self, request_id: str) -> None:
        """Return when its ingress has everything that was `put` of a request; at once if it is not open."""
        if (route := self._routes.get(request_id)) is not None:
            await route.peer.acknowledged(request_id)

    def hand_over(self, request_id: str, migrated: Migrated) -> bool:
        """Another engine sends the request's deltas from now on; False if nobody waits for them."""
        route = self._routes.get(request_id)
        if route is None or route.ended.done():
            return False
        route.ended.set_result(migrated)
        return True

    def shut(self) -> None:
        """Close all connections; what has been handed to them still goes out, for two seconds."""
        for peer in self._peers.values():
            peer.shut()
        self._peers.clear()

    def _lost(self, peer: _Peer, reason: str) -> None:
        if self._peers.get(peer.address) is not peer:
            return
        del self._peers[peer.address]
        peer.shut()
        lost = [request_id for request_id, route in self._routes.items() if route.peer is peer]
        if lost:
            logger.warning("%d requests end, because the ingress at %s %s", len(lost), peer.address, reason)
        for request_id in lost:
            self._cancel(request_id)
            self.fail(request_id, EngineDeadError(f"the ingress {reason}"))


class _Route:
    """Where one request's deltas go."""

    __slots__ = ("ended", "peer", "stream")

    def __init__(self, peer: _Peer, stream: int, ended: asyncio.Future[Migrated | None]) -> None:
        self.peer = peer
        self.stream = stream
        self.ended = ended


class _Peer:
    """The connection to one ingress process."""

    def __init__(
        self, reply_to: ReplyTo, stall_s: float, silence_s: float, lost: Callable[[_Peer, str], None]
    ) -> None:
        self.address = reply_to.address
        self.pending: dict[str, tuple[_Route, TokenDelta]] = {}
        self._secret = reply_to.secret
        self._stall_s = stall_s
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._num_ahead = self._num_sent = self._num_receipts = 0
        self._receipt = asyncio.Event()
        self._newest_receipt_s = 0.0
        self._stall_timer: asyncio.TimerHandle | None = None
        self._socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self._socket.linger = _LINGER_MS
        self._socket.ipv6 = True
        silence_ms = int(silence_s * 1000)
        self._socket.heartbeat_ivl = silence_ms // 5
        self._socket.heartbeat_timeout = silence_ms
        self._socket.reconnect_ivl = -1  # what was on its way is lost, and so are the requests
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._tasks = [
            self._loop.create_task(self._read_receipts()),
            self._loop.create_task(self._watch_connection()),
        ]
        self._socket.connect(self.address)

    def add(self, delta: TokenDelta, route: _Route) -> None:
        earlier = self.pending.get(delta.request_id)
        self.pending[delta.request_id] = (route, earlier[1].then(delta) if earlier is not None else delta)

    def flush(self) -> None:
        """Send what there is, as far as the ingress has acknowledged what came before."""
        if self._socket.closed:  # its requests have been told, and are about to go
            self.pending.clear()
        while self.pending and self._num_ahead < MESSAGES_AHEAD:
            batch = self._take()
            message = encode([(route.stream, delta) for route, delta in batch])
            self._socket.send_multipart((self._secret, message), zmq.NOBLOCK)
            if self._num_ahead == 0:
                self._newest_receipt_s = self._loop.time()
                self._watch_stall(self._stall_s)
            self._num_ahead += 1
            self._num_sent += 1
            for route, delta in batch:
                if delta.finish_reason is not None and not route.ended.done():
                    route.ended.set_result(None)

    async def acknowledged(self, request_id: str) -> None:
        while request_id in self.pending:
            await self._next_receipt()
        num_sent = self._num_sent
        while self._num_receipts < num_sent:
            await self._next_receipt()

    async def _next_receipt(self) -> None:
        self._receipt.clear()
        await self._receipt.wait()

    def shut(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        self.pending.clear()
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close()

    def _take(self) -> list[tuple[_Route, TokenDelta]]:
        """The oldest of what is pending, as much as one message should hold."""
        batch, total = [], 0
        while self.pending and total < _MAX_WEIGHT:
            request_id = next(iter(self.pending))
            entry = self.pending.pop(request_id)
            batch.append(entry)
            total += weight(entry[1])
        return batch

    async def _read_receipts(self) -> None:
        while True:
            await self._socket.recv_multipart()
            self._num_ahead -= 1
            self._num_receipts += 1
            self._receipt.set()
            self._newest_receipt_s = self._loop.time()
            self.flush()

    async def _watch_connection(self) -> None:
        """A connection that breaks has lost what was on its way: no stream could go on without a gap."""
        while True:
            event = parse_monitor_message(await self._monitor.recv_multipart())
            if event["event"] == zmq.EVENT_DISCONNECTED:
                self._lost(self, "has gone away")
                return

    def _watch_stall(self, after_s: float) -> None:
        if self._stall_timer is None:
            self._stall_timer = self._loop.call_later(after_s, self._check_stall)

    def _check_stall(self) -> None:
        self._stall_timer = None
        if not self._num_ahead:
            return
        left_s = self._newest_receipt_s + self._stall_s - self._loop.time()
        if left_s > 0:
            self._watch_stall(left_s)
        else:
            self._lost(self, f"has taken no tokens for {self._stall_s:.0f} s")
