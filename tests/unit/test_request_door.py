"""Requests that reach an engine's process before their calls: the door, its wire, and who is served once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest
import zmq
import zmq.asyncio
from hypothesis import given
from hypothesis import strategies as st

from cluster.request_courier import Handover, RequestCourier
from cluster.token_inbox import TokenInbox, TokenStream
from engine.errors import EngineDeadError, OverloadedError, RequestError
from engine.messages import GenerateRequest, ReplyTo, SamplingParams, TokenDelta
from engine.open_requests import OpenRequests
from engine.request_door import RequestDoor
from engine.request_wire import OPEN, EngineAddress, decode_open, encode_open
from engine.token_sender import TokenSender

REQUEST = GenerateRequest("r", (1, 2, 3))
REPLY_TO = ReplyTo("tcp://127.0.0.1:1", b"secret", 7)


async def _eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.01)


def _run(case: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(case())  # type: ignore[arg-type]


@dataclass
class Process:
    """An engine's process: what was submitted and cancelled. Made in an event loop."""

    refusal: Exception | None = None
    kept_s: float = 60.0
    submitted: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sender = TokenSender(self.cancelled.append)
        self.requests = OpenRequests(self.sender, self._submit, self.cancelled.append, self.kept_s)
        self.listening = RequestDoor("127.0.0.1", self.requests)

    @property
    def door(self) -> EngineAddress:
        return self.listening.door

    def _submit(self, request: GenerateRequest) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.submitted.append(request.request_id)

    def say(self, *tokens: int, finish: bool = False) -> None:
        self.sender.put([TokenDelta("r", tokens, finish_reason="length" if finish else None)])

    def call(self, reply_to: ReplyTo) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(self.requests.run(REQUEST, reply_to))

    def close(self) -> None:
        self.listening.close()
        self.sender.shut()


@dataclass
class Client:
    """An ingress' process with one request."""

    num_kept: int = 0

    def __post_init__(self) -> None:
        self.inbox, self.courier = TokenInbox("127.0.0.1"), RequestCourier()
        self.stream: TokenStream = self.inbox.open("r")
        self.handover = Handover(self.courier, REQUEST, self.stream, self._keep)

    def _keep(self) -> None:
        self.num_kept += 1

    async def knows(self, *processes: Process) -> Client:
        """The first request only makes the connection."""
        for process in processes:
            assert self.courier.hand_over(REQUEST, self.stream.reply_to, process.door) is None
            await _eventually(lambda door=process.door: self.courier._ways[door].is_up)  # type: ignore[misc]
        return self

    async def read(self) -> tuple[int, ...]:
        async with asyncio.timeout(20):
            return (await self.stream.get()).token_ids

    def close(self, *processes: Process) -> None:
        self.handover.close()
        self.stream.close()
        self.courier.close()
        self.inbox.close()
        for process in processes:
            process.close()


async def _begun(kept_s: float = 60.0) -> tuple[Process, Client]:
    """A process that has begun a request which no call has come for, and its client."""
    process = Process(kept_s=kept_s)
    client = await Client().knows(process)
    client.handover.send_to(process.door)
    await _eventually(lambda: process.submitted == ["r"])
    return process, client


_FLOATS = st.floats(0.1, 1.0)
_SAMPLING = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 1000),
    temperature=st.floats(0, 2),
    top_p=_FLOATS,
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    logit_bias=st.lists(st.tuples(st.integers(0, 1 << 20), st.floats(-100, 100)), max_size=3).map(tuple),
    logprobs=st.none() | st.integers(0, 20),
    stop_token_ids=st.lists(st.integers(0, 1 << 20), max_size=3).map(tuple),
    ignore_eos=st.booleans(),
)
_REQUESTS = st.builds(
    GenerateRequest,
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    st.lists(st.integers(0, 2**32 - 1), max_size=9).map(tuple),
    _SAMPLING,
    cache_salt=st.text(st.characters(exclude_categories=["Cs"])),
    ttft_slo_s=st.none() | _FLOATS,
    priority=st.integers(-9, 9),
    unpaced=st.booleans(),
    session_id=st.text(st.characters(exclude_categories=["Cs"])),
)


@given(_REQUESTS, st.integers(1, 1 << 40))
def test_what_arrives_is_what_was_sent(request_: GenerateRequest, stream: int) -> None:
    reply_to = ReplyTo("tcp://[::1]:5000", b"\x00\xff", stream)
    secret, kind, *frames = encode_open(b"secret", request_, reply_to)
    assert (secret, kind) == (b"secret", OPEN)
    assert decode_open(*frames) == (request_, reply_to)


@pytest.mark.parametrize(
    "frames", [(b"", b""), (b"{}", b""), (b"[1]", b""), (b'{"sampling": {}}', b"abc"), (b"null", b"")]
)
def test_what_is_no_request_is_refused(frames: tuple[bytes, bytes]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        decode_open(*frames)


def test_a_stranger_is_not_listened_to(caplog: pytest.LogCaptureFixture) -> None:
    async def case() -> None:
        process = Process()
        stranger = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        stranger.connect(process.door.address)
        good = encode_open(process.door.secret, REQUEST, REPLY_TO)
        for frames in [(b"x",), encode_open(b"guess", REQUEST, REPLY_TO), good[:2], (good[0], b"shut", b"")]:
            await stranger.send_multipart(frames)
        await stranger.send_multipart(good)
        await _eventually(lambda: process.submitted == ["r"])
        assert process.listening._num_strange == 4
        assert len([one for one in caplog.records if "no ingress" in one.message]) == 3  # 1, 2 and 4
        stranger.close(0)
        process.close()

    _run(case)


def test_a_request_is_begun_before_its_call_and_once() -> None:
    async def case() -> None:
        process, client = await _begun()
        process.say(1)
        assert await client.read() == (1,)
        call = process.call(client.stream.reply_to)
        await asyncio.sleep(0)
        assert process.requests.num_unclaimed == 0
        process.say(2, finish=True)
        assert await client.read() == (2,)
        await call
        assert (process.submitted, process.cancelled, client.handover.was_begun) == (["r"], [], True)
        client.close(process)

    _run(case)


def test_a_call_that_was_quicker_is_the_one() -> None:
    async def case() -> None:
        process = Process()
        client = await Client().knows(process)
        call = process.call(client.stream.reply_to)
        await _eventually(lambda: process.submitted == ["r"])
        client.handover.send_to(process.door)
        await asyncio.sleep(0.05)
        process.say(1, finish=True)
        assert await client.read() == (1,)
        await call
        assert (process.submitted, process.requests.num_early) == (["r"], 0)
        client.close(process)

    _run(case)


def test_how_it_ended_is_kept_for_its_call_and_not_for_ever() -> None:
    async def case() -> None:
        process, client = await _begun(kept_s=0.2)
        process.say(1, finish=True)
        assert await client.read() == (1,)
        assert (process.requests.num_early, process.requests.num_unclaimed) == (1, 0)
        await process.call(client.stream.reply_to)  # returns at once
        assert process.submitted == ["r"]
        process.requests.begin(REQUEST, client.stream.another())
        process.say(1, finish=True)
        await _eventually(lambda: process.requests.num_early == 0)
        assert process.cancelled == []
        client.close(process)

    _run(case)


@pytest.mark.parametrize("error", [OverloadedError("full", 3.0), RequestError("wrong")])
def test_a_refusal_is_told_to_the_call(error: Exception) -> None:
    async def case() -> None:
        process = Process(refusal=error)
        client = await Client().knows(process)
        client.handover.send_to(process.door)
        await _eventually(lambda: process.requests.num_early == 1)
        with pytest.raises(type(error), match=str(error)):
            await process.call(client.stream.reply_to)
        assert process.requests.num_early == 0
        client.close(process)

    _run(case)


def test_a_group_that_refuses_the_call_gives_back_what_was_begun() -> None:
    """The other group's tokens are the only ones, though the first had some ready."""

    async def case() -> None:
        first, second = Process(), Process()
        client = await Client().knows(first, second)
        client.handover.send_to(first.door)
        await _eventually(lambda: first.submitted == ["r"])
        first.say(7)
        await asyncio.sleep(0.05)
        client.handover.recall()
        client.handover.send_to(second.door)
        await _eventually(lambda: second.submitted == ["r"] and first.cancelled == ["r"])
        first.say(8)
        second.say(1)
        assert await client.read() == (1,)
        assert (client.num_kept, first.requests.num_early) == (0, 0)
        client.close(first, second)

    _run(case)


def test_what_its_client_has_read_of_stays_where_it_is() -> None:
    async def case() -> None:
        first, second = Process(), Process()
        client = await Client().knows(first, second)
        client.handover.send_to(first.door)
        await _eventually(lambda: first.submitted == ["r"])
        first.say(7)
        assert await client.read() == (7,)
        client.handover.recall()
        client.handover.recall()
        client.handover.send_to(second.door)
        call = second.call(client.stream.reply_to)  # before it is cancelled
        await _eventually(lambda: second.submitted == ["r"])
        second.say(1)
        await asyncio.sleep(0.05)
        first.say(8)
        assert await client.read() == (8,)
        assert client.num_kept == 1
        assert len(client.courier._ways[first.door].on_loss) == 1
        assert first.requests.num_unclaimed == 1  # what a group that leaves waits for
        call.cancel()
        first.close()
        with pytest.raises(EngineDeadError):  # nobody else would tell
            await client.read()
        client.close(second)

    _run(case)


@pytest.mark.parametrize("has_ended", [True, False])
def test_what_stayed_is_forgotten_at_its_end(has_ended: bool) -> None:
    async def case() -> None:
        process, client = await _begun()
        process.say(7, finish=has_ended)
        await client.read()
        client.handover.recall()
        client.handover.close(has_ended)
        assert client.courier._ways[process.door].on_loss == {}
        if not has_ended:
            await _eventually(lambda: process.cancelled == ["r"])
        client.close(process)
        assert process.cancelled == ([] if has_ended else ["r"])

    _run(case)


def test_a_client_that_leaves_ends_what_no_call_has_come_for() -> None:
    async def case() -> None:
        process, client = await _begun()
        client.handover.close()
        await _eventually(lambda: process.cancelled == ["r"])
        client.handover.send_to(process.door)  # too late
        await asyncio.sleep(0.05)
        assert process.submitted == ["r"]
        client.close(process)

    _run(case)


def test_an_engine_that_is_gone_gets_nothing() -> None:
    async def case() -> None:
        process = Process()
        client = await Client().knows(process)
        process.close()
        await _eventually(lambda: process.door not in client.courier._ways)
        client.handover.send_to(process.door)
        assert not client.handover.was_begun
        client.close()

    _run(case)


def test_a_router_in_another_thread_may_tell() -> None:
    async def case() -> None:
        process = Process()
        client = await Client().knows(process)
        await asyncio.to_thread(client.handover.send_to, process.door)
        await _eventually(lambda: process.submitted == ["r"])
        await asyncio.to_thread(client.handover.recall)
        await _eventually(lambda: process.cancelled == ["r"])
        client.close(process)

    _run(case)


def test_a_call_lets_the_first_token_pass() -> None:
    """Once, and not for longer than a moment."""

    async def case() -> None:
        loop = asyncio.get_running_loop()
        process, client = await _begun()
        process.say(7)
        started = loop.time()
        await client.handover.pause()
        assert client.stream._pending is not None
        await client.handover.pause()
        assert loop.time() - started < 5
        client.close(process)
        silent, client = await _begun()
        await client.handover.pause()
        assert client.stream._pending is None, "no token has come, and the call is made"
        client.close(silent)

    _run(case)
