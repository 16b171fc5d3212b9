"""Takes requests to the doors of engines, past Ray: what Serve's router has chosen a group for is begun there
before Serve's call arrives.

The call goes its way all the same, and counts. Where it is refused, since the group is full or leaves, what
was begun is taken back; unless its client has read of it: then it stays, the only one, and the call ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from typing import Any

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from cluster.token_inbox import TokenStream
from engine.errors import EngineDeadError
from engine.messages import GenerateRequest, ReplyTo
from engine.request_wire import EngineAddress, encode_drop, encode_open
from engine.token_wire import SILENCE_S

_SILENCE_MS = int(SILENCE_S * 1000)
# Serve's call costs the ingress 1.5 ms, in which a first token waits. It is made once that token has gone on
# its way to the client, or after so long: until then Serve and its autoscaling do not know of the request.
_FIRST_TOKEN_S = 0.01
_TO_CLIENT_S = 0.002
_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


class RequestCourier:
    """The sending end of an ingress process; for one event loop."""

    def __init__(self) -> None:
        self._ways: dict[EngineAddress, _Way] = {}

    def hand_over(self, request: GenerateRequest, reply_to: ReplyTo, door: EngineAddress) -> _Way | None:
        """Have it begun there. None if it was not sent: that engine is not reached yet, or reads slowly."""
        way = self._ways.get(door)
        if way is None:
            self._ways[door] = _Way(door, self._forget)
        elif way.is_up and way.send(encode_open(door.secret, request, reply_to)):
            return way
        return None

    def close(self) -> None:
        """Leave all doors."""
        for way in list(self._ways.values()):
            way.end()

    def _forget(self, door: EngineAddress) -> None:
        self._ways.pop(door, None)


class _Way:
    """The connection to one engine.

    Attributes:
        is_up: it has been reached, and not been lost since.
        on_loss: what to do when it is lost, by request.
    """

    def __init__(self, door: EngineAddress, forget: Callable[[EngineAddress], None]) -> None:
        self.door = door
        self.is_up = False
        self.on_loss: dict[str, Callable[[], None]] = {}
        self._forget = forget
        self._socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self._sending = zmq.Socket(self._socket)  # the same one: no task, and no future, a message
        self._socket.linger = 0
        self._socket.ipv6 = True
        self._socket.heartbeat_ivl = _SILENCE_MS // 5
        self._socket.heartbeat_timeout = _SILENCE_MS
        self._monitor = self._socket.get_monitor_socket(_EVENTS)
        self._task = asyncio.get_running_loop().create_task(self._watch())
        self._socket.connect(door.address)

    def send(self, frames: tuple[bytes, ...]) -> bool:
        """False if an engine that reads too slowly has left no room for it."""
        try:
            self._sending.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def drop(self, request_id: str) -> None:
        """No call will come for that one. Lost where there is no room: its tokens are for nobody, and end."""
        if self.is_up:
            self.send(encode_drop(self.door.secret, request_id))

    def end(self) -> None:
        self._forget(self.door)
        self.is_up = False
        self._task.cancel()
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)

    async def _watch(self) -> None:
        while True:
            event = parse_monitor_message(await self._monitor.recv_multipart())["event"]
            if event == zmq.EVENT_DISCONNECTED:
                break
            self.is_up = True
        self.end()
        for lost in list(self.on_loss.values()):
            lost()


class Handover:
    """One call's request on its way to an engine; what the call carries.

    Pickled it is the `ReplyTo` that whoever takes the call sends to. In this process Serve's router tells it
    which group was chosen, and when that has refused: from whichever thread the router runs in.

    Args:
        stream: of this attempt.
        keep: called when the group has refused what its client has read of.

    Attributes:
        was_begun: an engine may have had it.
        is_under_way: it has been sent to one, and not been taken back.
    """

    def __init__(
        self,
        courier: RequestCourier,
        request: GenerateRequest,
        stream: TokenStream,
        keep: Callable[[], None],
    ) -> None:
        self.was_begun = False
        self._courier = courier
        self._request = request
        self._stream = stream
        self._keep = keep
        self._loop = asyncio.get_running_loop()
        self._way: _Way | None = None
        self._number = 0
        self._is_closed = self._is_kept = self._has_paused = False
        self._early: tuple[Hashable, asyncio.Future[Any]] | None = None

    @property
    def is_under_way(self) -> bool:
        return self._way is not None

    def __reduce__(self) -> tuple[Any, ...]:
        reply_to = self._stream.reply_to
        return ReplyTo, (reply_to.address, reply_to.secret, reply_to.stream)

    def send_to(self, door: EngineAddress) -> None:
        """The group behind that door gets the call."""
        self._call(self._send_to, door)

    def chosen_early(self, group: Hashable, choice: asyncio.Future[Any]) -> None:
        """A group was chosen, and has the request, before Serve was asked.

        Args:
            choice: cancelled when Serve is told of the group, or never will be.
        """
        self._early = group, choice

    def take_early(self) -> Hashable | None:
        """That group, once."""
        if self._early is None:
            return None
        (group, choice), self._early = self._early, None
        choice.cancel()
        return group

    async def pause(self) -> None:
        """Where the request was sent to its group, let the first token pass before the call is made; once.
        For a router in this event loop; another one's work is in nobody's way.
        """
        if self.is_under_way and not self._has_paused and asyncio.get_running_loop() is self._loop:
            self._has_paused = True
            await self._stream.begun(_FIRST_TOKEN_S)
            await asyncio.sleep(_TO_CLIENT_S)

    def recall(self) -> None:
        """The group that was to get the call has refused it; another will be chosen."""
        self._call(self._recall)

    def close(self, has_ended: bool = False) -> None:
        """Nobody reads any more, whether or not the request has ended."""
        self._is_closed = True
        if not has_ended:
            self.take_early()
        if self._way is not None:
            self._way.on_loss.pop(self._request.request_id, None)
            if not has_ended:
                self._way.drop(self._request.request_id)
            self._way = None

    def _call(self, method: Callable[..., None], *arguments: object) -> None:
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:
            here = None
        if here is self._loop:
            method(*arguments)
        else:
            self._loop.call_soon_threadsafe(method, *arguments)

    def _send_to(self, door: EngineAddress) -> None:
        if self._is_closed or self._way is not None:
            return
        reply_to = self._stream.another()
        self._way = self._courier.hand_over(self._request, reply_to, door)
        self._number = reply_to.stream
        self.was_begun = self.was_begun or self._way is not None

    def _recall(self) -> None:
        if self._is_closed or self._is_kept or self._way is None:
            return
        if self._stream.renounce(self._number):
            self._way.drop(self._request.request_id)
            self._way = None
            return
        # No call tells of this engine's end any more; the connection to it does.
        lost = EngineDeadError("the engine that served this request ended")
        self._way.on_loss[self._request.request_id] = lambda: self._stream.fail(lost)
        self._stream.keep_only(self._number)
        self._is_kept = True
        self._keep()
