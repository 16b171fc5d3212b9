"""A small server with OpenAI's endpoints that answers as a test tells it."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

from aiohttp import web

DONE = "data: [DONE]\n\n"


def text(words: str, reason: str | None = None) -> str:
    """An event of the completions endpoint."""
    return "data: " + json.dumps({"choices": [{"text": words, "finish_reason": reason}]}) + "\n\n"


def ids(words: str, *token_ids: int, reason: str | None = None) -> str:
    """An event of the completions endpoint that tells its tokens, as vLLM does where it is asked to."""
    choice = {"text": words, "token_ids": token_ids, "finish_reason": reason}
    return "data: " + json.dumps({"choices": [choice]}) + "\n\n"


def usage(prompt: int, completion: int) -> str:
    """The event that counts the tokens."""
    counts = {"prompt_tokens": prompt, "completion_tokens": completion}
    return "data: " + json.dumps({"choices": [], "usage": counts}) + "\n\n"


def chat(**delta: str) -> str:
    """An event of the chat endpoint."""
    return "data: " + json.dumps({"choices": [{"delta": delta, "finish_reason": None}]}) + "\n\n"


FOUR_TOKENS = [text("a"), 0.05, text("b c"), text("d", "length"), usage(7, 4), DONE]


class FakeServer:
    """An HTTP server in a thread. The `script` of a request says what it gets.

    Attributes:
        script: of requests that bring none; a stop is a float (seconds), `"drop"` closes the connection, a
            number and a text are a status and its body, a dict is a JSON body without a stream.
        hangs_after: requests after which every further one waits for a minute; None for never.
        fails_after: requests after which every further one gets a 500; None for never.
        refuses: a field whose requests get a 400.
        bodies, headers: of the requests that came.
        most_open: most requests that were being answered at once.
    """

    def __init__(self) -> None:
        self.script: list[Any] = FOUR_TOKENS
        self.fails_after: int | None = None
        self.hangs_after: int | None = None
        self.refuses: str | None = None
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.open = self.most_open = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._runner, self.url = self._call(self._start())

    def close(self) -> None:
        self._call(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _start(self) -> tuple[web.AppRunner, str]:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/version", self._version)
        app.router.add_post("/v1/completions", self._post)
        app.router.add_post("/v1/chat/completions", self._post)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        return runner, f"http://127.0.0.1:{port}"

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "first"}, {"id": "second"}]})

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "9.8.7"})

    async def _post(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            refused = [400, f"{self.refuses} is not supported"] if self.refuses in body else None
            return await self._answer(request, refused or body.get("script", self.script))
        finally:
            self.open -= 1

    async def _answer(self, request: web.Request, script: list[Any]) -> web.StreamResponse:
        if self.fails_after is not None and len(self.bodies) > self.fails_after:
            script = [500, "boom"]
        if self.hangs_after is not None and len(self.bodies) > self.hangs_after:
            script = [60.0]
        if isinstance(script[0], int):
            return web.Response(status=script[0], text=script[1])
        if isinstance(script[0], dict):
            return web.json_response(script[0])
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for part in script:
            if part == "drop":
                assert request.transport is not None
                request.transport.close()
                return response
            if isinstance(part, float):
                await asyncio.sleep(part)
            else:
                await response.write(part.encode())
        return response
