"""The requests of an engine's process, by whichever way they came: by the door, by a call, or by both.

A request that came by the door is begun at once, and the call that Ray Serve made for it, which takes some
milliseconds more, finds it under way. Owns which of them no call has come for yet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from engine.errors import BallonetError, RequestError
from engine.messages import GenerateRequest, ReplyTo
from engine.migration import Migrated
from engine.token_sender import TokenSender

Ended = asyncio.Future[Migrated | None]
KEPT_S = 60.0  # how the request ended, for a call that comes late; Serve's take milliseconds


class OpenRequests:
    """For one event loop.

    Args:
        sender: of this process; opened and closed here.
        submit: gives a request to the engine. Raises BallonetError if it does not take it.
        cancel: ends one in the engine, whatever has become of it.
        kept_s: how long it is known how a request ended that no call has come for.
    """

    def __init__(
        self,
        sender: TokenSender,
        submit: Callable[[GenerateRequest], None],
        cancel: Callable[[str], None],
        kept_s: float = KEPT_S,
    ) -> None:
        self._sender = sender
        self._submit = submit
        self._cancel = cancel
        self._kept_s = kept_s
        self._early: dict[str, Ended] = {}

    @property
    def num_early(self) -> int:
        """Requests that no call has come for, those that have ended among them."""
        return len(self._early)

    @property
    def num_unclaimed(self) -> int:
        """Requests under way that no call has come for."""
        return sum(not ended.done() for ended in self._early.values())

    def begin(self, request: GenerateRequest, reply_to: ReplyTo) -> None:
        """Begin it before its call comes. One whose call has been quicker is left alone."""
        if request.request_id in self._early or self._sender.is_open(request.request_id):
            return
        ended = self._start(request, reply_to)
        self._early[request.request_id] = ended
        ended.add_done_callback(lambda _: self._has_ended(request.request_id, ended))

    def drop(self, request_id: str) -> None:
        """No call will come for it; one that has a call ends with that."""
        if (ended := self._early.pop(request_id, None)) is not None:
            self._close(request_id, ended)

    def is_claimed(self, request_id: str) -> bool:
        """Whether a call has come for it: only such a request can move, since its call tells where it is."""
        return request_id not in self._early

    async def run(self, request: GenerateRequest, reply_to: ReplyTo) -> Migrated | None:
        """The call: returns when the last delta has been sent, or the request has moved to another engine.
        Whoever cancels it cancels the request.

        Raises:
            BallonetError: it was not taken, or cannot be finished here.
        """
        ended = self._early.pop(request.request_id, None)
        if ended is None:
            self._refuse_twice(request.request_id)
            ended = self._start(request, reply_to)
        return await self._until(request.request_id, ended)

    async def attend(
        self, request_id: str, reply_to: ReplyTo, adopt: Callable[[], Awaitable[None]]
    ) -> Migrated | None:
        """As `run`, for a request that has moved here: it goes on when `adopt` has returned."""
        self._refuse_twice(request_id)
        ended = self._sender.open(request_id, reply_to)
        try:
            await adopt()
        except BaseException:
            self._close(request_id, ended)
            raise
        return await self._until(request_id, ended)

    def _refuse_twice(self, request_id: str) -> None:
        if self._sender.is_open(request_id):
            raise RequestError(f"a request with the id {request_id!r} is still open")

    async def _until(self, request_id: str, ended: Ended) -> Migrated | None:
        try:
            return await ended
        finally:
            self._close(request_id, ended)

    def _start(self, request: GenerateRequest, reply_to: ReplyTo) -> Ended:
        ended = self._sender.open(request.request_id, reply_to)
        try:
            self._submit(request)
        except BallonetError as error:
            self._sender.fail(request.request_id, error)
        return ended

    def _close(self, request_id: str, ended: Ended) -> None:
        has_ended = ended.done() and not ended.cancelled() and ended.exception() is None
        self._sender.close(request_id)
        if not has_ended:
            self._cancel(request_id)

    def _has_ended(self, request_id: str, ended: Ended) -> None:
        if not ended.cancelled():
            ended.exception()  # looked at: asyncio complains of those that nobody did
        if self._early.get(request_id) is ended:
            self._sender.close(request_id)
            ended.get_loop().call_later(self._kept_s, self._forget, request_id, ended)

    def _forget(self, request_id: str, ended: Ended) -> None:
        if self._early.get(request_id) is ended:
            del self._early[request_id]
