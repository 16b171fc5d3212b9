"""A streamed answer that ends in good order, whoever ends it.

Owns the wire side of server-sent events: headers, the watch for a client that leaves, the error event.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.api_responses import DONE_EVENT, error_event
from cluster.http_errors import ClientDisconnectedError, HttpError

T = TypeVar("T")

_HEADERS = {
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would otherwise hold small events back
}


class EventStreamResponse(Response):
    """Sends `first`, then `events` one by one, then `[DONE]`; closes them when the client leaves.

    Args:
        events: more encoded events; closed in every case, before this response returns.
        describe: what to tell the client when `events` fails.
        deadline_s: on the event loop's clock; the stream ends with an error event there.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        first: bytes,
        events: AsyncGenerator[bytes, None],
        describe: Callable[[Exception], HttpError],
        deadline_s: float | None = None,
    ) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._first = first
        self._events = events
        self._describe = describe
        self._deadline_s = deadline_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # At once: the watch over the client costs a turn of the event loop, and can wait.
            start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            await send(start)
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            await until_disconnect(receive, self._send_rest(send))
        except (ClientDisconnectedError, OSError):
            return  # OSError is how some servers tell that the client has left
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        """Close the events: for an answer that nobody is going to send."""
        await self._events.aclose()

    async def _send_rest(self, send: Send) -> None:
        try:
            async with asyncio.timeout_at(self._deadline_s):
                async for event in self._events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        except OSError as error:
            if not isinstance(error, TimeoutError):
                raise
            await self._send_error(error, send)
        except Exception as error:  # the status is sent: an event is the only way left to tell
            await self._send_error(error, send)
        await send({"type": "http.response.body", "body": DONE_EVENT})

    async def _send_error(self, error: Exception, send: Send) -> None:
        event = error_event(self._describe(error))
        await send({"type": "http.response.body", "body": event, "more_body": True})


async def until_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled and has ended if the client leaves first.

    A stream that `work` returns in the moment in which the caller is cancelled is closed. The request's
    body must have been read: from then on `receive` has nothing but the disconnect.

    Raises:
        ClientDisconnectedError: the client left.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnectedError("the client left before its answer was ready")
        watch.cancel()  # and not waited for: its end is nobody's business, and the first token would wait
    except BaseException:
        task.cancel()
        watch.cancel()
        try:
            await asyncio.gather(task, watch, return_exceptions=True)
        finally:
            await _close_result(task)
        raise
    return task.result()


async def _close_result(task: asyncio.Future[T]) -> None:
    if task.done() and not task.cancelled() and task.exception() is None:
        result = task.result()
        if isinstance(result, EventStreamResponse):
            await result.aclose()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
