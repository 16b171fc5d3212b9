"""What only shows on the wire: when tokens leave, and what happens when the client does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from cluster.event_stream import EventStreamResponse, until_disconnect
from cluster.http_errors import describe
from cluster.ingress import IngressConfig, create_app
from engine.messages import GenerateRequest, TokenDelta
from tests.unit.ingress_fakes import FakeModel, Item, RecordingObserver, Script, text_script

BODY: dict[str, Any] = {"model": "org/tiny", "prompt": "hi", "max_tokens": 100}


class Wire:
    """One HTTP request at the level of ASGI, whose client can leave at any moment."""

    def __init__(self, app: FastAPI, path: str, body: dict[str, Any]) -> None:
        self._app = app
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [],
            "scheme": "http",
            "server": ("test", 80),
        }
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": json.dumps(body).encode()})
        self.sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def run(self) -> None:
        await self._app(self._scope, self._incoming.get, self.sent.put)

    def leave(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})


def within_seconds(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run an async test that must not hang."""

    async def bounded() -> None:
        await asyncio.wait_for(test(), 10)

    asyncio.run(bounded())


def gated(gate: asyncio.Event, before: str = "", after: str = "") -> Script:
    """Waits for `gate` between two texts."""

    def play(request: GenerateRequest) -> Iterable[Item]:
        for byte in before.encode():
            yield TokenDelta(request.request_id, (byte,))
        yield gate
        yield from text_script(after)(request)

    return play


async def settled(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_tokens_leave_as_they_come() -> None:
    async def scenario() -> None:
        gate = asyncio.Event()
        wire = Wire(
            create_app({"org/tiny": FakeModel(gated(gate, "ab", "c"))}),
            "/v1/completions",
            {**BODY, "stream": True},
        )
        task = asyncio.create_task(wire.run())
        assert (await wire.sent.get())["status"] == 200
        assert b'"text":"a"' in (await wire.sent.get())["body"]
        assert b'"text":"b"' in (await wire.sent.get())["body"]
        assert not task.done()
        gate.set()
        assert b'"text":"c"' in (await wire.sent.get())["body"]
        await task

    within_seconds(scenario)


def test_role_and_first_text_leave_together() -> None:
    async def scenario() -> None:
        body = {"model": "org/tiny", "messages": [{"role": "user", "content": "x"}], "stream": True}
        wire = Wire(create_app({"org/tiny": FakeModel()}), "/v1/chat/completions", body)
        await wire.run()
        await wire.sent.get()
        first = (await wire.sent.get())["body"]
        assert first.count(b"data: ") == 2
        assert first.index(b'"role":"assistant"') < first.index(b'"content":"H"')

    within_seconds(scenario)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("before", ["", "ab"])
@pytest.mark.parametrize("n", [1, 3])
def test_leaving_closes_every_engine_request(stream: bool, before: str, n: int) -> None:
    async def scenario() -> None:
        observer = RecordingObserver()
        model = FakeModel(gated(asyncio.Event(), before))
        app = create_app({"org/tiny": model}, observer=observer)
        wire = Wire(app, "/v1/completions", {**BODY, "stream": stream, "n": n})
        task = asyncio.create_task(wire.run())
        await settled(lambda: model.num_yielded == n * len(before) and len(model.requests) == n)
        await asyncio.sleep(0.01)
        assert model.closed == []
        wire.leave()
        await task
        assert len(set(model.closed)) == n
        ends = [event[2] for event in observer.events if event[0] == "finished"]
        assert ends == ["cancelled"]

    within_seconds(scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_cancelling_the_handler_closes_the_engine_request(stream: bool) -> None:
    """Ray Serve cancels the handler's task when its proxy loses the client."""

    async def scenario() -> None:
        model = FakeModel(gated(asyncio.Event(), "ab"))
        wire = Wire(create_app({"org/tiny": model}), "/v1/completions", {**BODY, "stream": stream, "n": 2})
        task = asyncio.create_task(wire.run())
        await settled(lambda: model.num_yielded == 4)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(model.closed) == 2

    within_seconds(scenario)


def test_a_stream_that_nobody_gets_is_closed() -> None:
    """The handler is cancelled when its stream has just begun; at which turn of the loop does not matter."""

    async def scenario(turns: int) -> bool:
        closed: list[bool] = []

        async def play() -> AsyncGenerator[bytes, None]:
            try:
                yield b"first"
                yield b"second"
            finally:
                closed.append(True)

        events = play()  # referred to until the end, so that no collector closes it

        async def work() -> EventStreamResponse:
            return EventStreamResponse(await anext(events), events, describe)

        task = asyncio.create_task(until_disconnect(asyncio.Queue().get, work()))
        for _ in range(turns):
            await asyncio.sleep(0)
        if task.done():
            await task.result().aclose()
            return True
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert closed == [True]
        return False

    delivered = [asyncio.run(scenario(turns)) for turns in range(2, 12)]
    assert delivered[0] is False
    assert delivered[-1] is True


def test_a_send_that_fails_closes_the_engine_request() -> None:
    async def scenario() -> None:
        model = FakeModel(text_script("x" * 1000))
        wire = Wire(create_app({"org/tiny": model}), "/v1/completions", {**BODY, "stream": True})

        async def broken(message: dict[str, Any]) -> None:
            if wire.sent.qsize() > 3:
                raise OSError("connection reset")
            await wire.sent.put(message)

        await wire._app(wire._scope, wire._incoming.get, broken)
        assert len(model.closed) == 1
        assert model.num_yielded < 20

    within_seconds(scenario)


@pytest.mark.parametrize("before", ["", "ab"])
def test_time_limit(before: str) -> None:
    async def scenario() -> None:
        model = FakeModel(gated(asyncio.Event(), before))
        app = create_app({"org/tiny": model}, IngressConfig(request_timeout_s=0.1))
        wire = Wire(app, "/v1/completions", {**BODY, "stream": True})
        await wire.run()
        assert (await wire.sent.get())["status"] == (200 if before else 408)
        bodies = b"".join([wire.sent.get_nowait()["body"] for _ in range(wire.sent.qsize())])
        assert b"request_timeout" in bodies
        assert bodies.endswith(b"data: [DONE]\n\n") == bool(before)
        assert len(model.closed) == 1

    within_seconds(scenario)


async def client_of(app: FastAPI) -> AsyncGenerator[openai.AsyncOpenAI, None]:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport) as http_client:
        yield openai.AsyncOpenAI(
            api_key="sesame", base_url="http://test/v1", http_client=http_client, max_retries=0
        )


def test_openai_client_understands_everything() -> None:
    async def scenario() -> None:
        model = FakeModel(text_script("Hi é!", size=2))
        app = create_app({"org/tiny": model}, IngressConfig(api_keys=("sesame",)))
        async for client in client_of(app):
            await _chats(client)
            await _completes(client)
            assert [card.id async for card in client.models.list()] == ["org/tiny"]
            assert (await client.models.retrieve("org/tiny")).owned_by == "ballonet"
            with pytest.raises(openai.NotFoundError) as unknown:
                await client.models.retrieve("org/none")
            assert unknown.value.code == "model_not_found"
            with pytest.raises(openai.BadRequestError) as wrong:
                await client.completions.create(model="org/tiny", prompt="x", temperature=9)
            assert wrong.value.param == "temperature"
            with pytest.raises(openai.AuthenticationError):
                await client.with_options(api_key="wrong").models.list()

    within_seconds(scenario)


async def _chats(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="org/tiny", messages=[{"role": "user", "content": "x"}], logprobs=True, top_logprobs=2, n=2
    )
    assert [choice.message.content for choice in answer.choices] == ["Hi é!", "Hi é!"]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [entry.token for entry in logprobs.content[:2]] == ["H", "i"]
    stream = await client.chat.completions.create(
        model="org/tiny",
        messages=[{"role": "user", "content": "x"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hi é!"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 7


async def _completes(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="org/tiny", prompt=["x", "y"], logprobs=1)
    assert [choice.text for choice in answer.choices] == ["Hi é!", "Hi é!"]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.text_offset == [0, 1, 2, 3, 3, 4]
    stream = await client.completions.create(model="org/tiny", prompt="x", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "Hi é!"


def test_openai_client_raises_on_an_error_in_the_stream() -> None:
    async def scenario() -> None:
        model = FakeModel(text_script("ab", finish="error", error="bang"))
        async for client in client_of(create_app({"org/tiny": model})):
            stream = await client.completions.create(model="org/tiny", prompt="x", stream=True)
            with pytest.raises(openai.APIError, match="bang"):
                _ = [chunk async for chunk in stream]

    within_seconds(scenario)
