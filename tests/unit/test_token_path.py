"""Tokens between two processes' ends of the wire, over real sockets in one event loop."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

import orjson
import pytest
import zmq
import zmq.asyncio
from hypothesis import given
from hypothesis import strategies as st

from cluster.token_inbox import TokenInbox, TokenStream
from engine.errors import EngineDeadError
from engine.messages import ReplyTo, TokenDelta, TokenLogprobs
from engine.migration import Migrated
from engine.token_sender import MESSAGES_AHEAD, TokenSender
from engine.token_wire import add, decode, encode, to_delta
from tests.cut_proxy import CutProxy

SECRET = b"0123456789abcdef"


async def _eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.01)


def _delta(name: str, *tokens: int, finish: bool = False) -> TokenDelta:
    return TokenDelta(name, tokens, finish_reason="length" if finish else None)


async def _read(stream: TokenStream) -> list[TokenDelta]:
    deltas = [await stream.get()]
    while deltas[-1].finish_reason is None:
        deltas.append(await stream.get())
    return deltas


@dataclass
class Ingress:
    """The receiving end by hand: nothing is acknowledged unless the test does."""

    socket: zmq.asyncio.Socket = field(
        default_factory=lambda: zmq.asyncio.Context.instance().socket(zmq.ROUTER)
    )
    sender: bytes = b""

    def __post_init__(self) -> None:
        self.socket.bind("tcp://127.0.0.1:*")
        self.address = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def reply_to(self, stream: int) -> ReplyTo:
        return ReplyTo(self.address, SECRET, stream)

    async def receive(self) -> list[tuple[int, TokenDelta]]:
        async with asyncio.timeout(20):
            self.sender, secret, payload = await self.socket.recv_multipart()
        assert secret == SECRET
        return [(row[0], to_delta(row, "r")) for row in decode(payload)]

    async def acknowledge(self) -> None:
        await self.socket.send_multipart((self.sender, b""))


def _run(case: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(case())  # type: ignore[arg-type]


_NUMBERS = st.one_of(st.just(float("-inf")), st.floats(allow_nan=False, allow_infinity=False))
_LOGPROBS = st.builds(
    TokenLogprobs, _NUMBERS, st.lists(st.tuples(st.integers(0, 1 << 20), _NUMBERS), max_size=3).map(tuple)
)
_DELTAS = st.builds(
    TokenDelta,
    st.just("r"),
    st.lists(st.integers(0, 1 << 20), max_size=5).map(tuple),
    st.lists(_LOGPROBS, max_size=3).map(tuple),
    st.sampled_from([None, "stop", "length", "cancelled", "error"]),
    st.none() | st.text(st.characters(exclude_categories=["Cs"])),
    st.integers(0, 9),
    st.integers(0, 1 << 20),
)


@given(st.lists(st.tuples(st.integers(1, 1 << 40), _DELTAS), max_size=5))
def test_what_arrives_is_what_was_sent(pairs: list[tuple[int, TokenDelta]]) -> None:
    assert [(row[0], to_delta(row, "r")) for row in decode(encode(pairs))] == pairs


@given(_DELTAS, _DELTAS)
def test_what_piles_up_is_what_the_engine_would_have_sent(first: TokenDelta, second: TokenDelta) -> None:
    row, later = decode(encode([(1, first), (1, second)]))
    add(row, later)
    assert to_delta(row, "r") == first.then(second)


def test_every_token_arrives_once_and_in_order() -> None:
    async def case() -> None:
        inbox, sender = TokenInbox("127.0.0.1"), TokenSender(lambda _: None)
        names = [f"r{index}" for index in range(20)]
        streams = {name: inbox.open(name) for name in names}
        ends = [sender.open(name, streams[name].reply_to) for name in names]
        readers = [asyncio.create_task(_read(streams[name])) for name in names]
        for step in range(100):
            sender.put([_delta(name, step, finish=step == 99) for name in names])
            if step % 7 == 0:
                await asyncio.sleep(0)
        async with asyncio.timeout(20):
            answers = await asyncio.gather(*readers)
            await asyncio.gather(*ends)
        for name, deltas in zip(names, answers, strict=True):
            assert [token for delta in deltas for token in delta.token_ids] == list(range(100))
            assert {delta.request_id for delta in deltas} == {name}
        assert len(answers[0]) < 100  # steps came faster than they were taken, and piled up
        sender.shut()
        inbox.close()

    _run(case)


def test_a_slow_ingress_gets_fewer_larger_messages() -> None:
    async def case() -> None:
        ingress, sender = Ingress(), TokenSender(lambda _: None)
        sender.open("r", ingress.reply_to(1))
        for step in range(1000):
            sender.put([_delta("r", step)])
        messages = [await ingress.receive() for _ in range(MESSAGES_AHEAD)]
        assert [delta.token_ids for ((_, delta),) in messages] == [(step,) for step in range(MESSAGES_AHEAD)]
        assert not await ingress.socket.poll(50)  # the rest waits for a receipt
        await ingress.acknowledge()
        ((stream, rest),) = await ingress.receive()
        assert stream == 1
        assert rest.token_ids == tuple(range(MESSAGES_AHEAD, 1000))
        sender.shut()
        ingress.socket.close(0)

    _run(case)


def test_a_request_goes_elsewhere_once_its_ingress_has_all_of_it() -> None:
    async def case() -> None:
        ingress, sender = Ingress(), TokenSender(lambda _: None)
        ended = sender.open("r", ingress.reply_to(1))
        for step in range(MESSAGES_AHEAD + 3):
            sender.put([_delta("r", step)])
        acknowledged = asyncio.create_task(sender.acknowledged("r"))
        for _ in range(MESSAGES_AHEAD + 1):  # the last one has all that had piled up
            await ingress.receive()
            assert not acknowledged.done()
            await ingress.acknowledge()
        async with asyncio.timeout(20):
            await acknowledged
        moved = Migrated("m", "other")
        assert sender.hand_over("r", moved)
        assert await ended == moved
        sender.close("r")
        assert not sender.hand_over("r", moved)
        sender.shut()
        ingress.socket.close(0)

    _run(case)


def test_one_step_is_one_message() -> None:
    async def case() -> None:
        ingress, sender = Ingress(), TokenSender(lambda _: None)
        for number in range(50):
            sender.open(f"r{number}", ingress.reply_to(number))
        sender.put([_delta(f"r{number}", 7) for number in range(50)])
        assert [stream for stream, _ in await ingress.receive()] == list(range(50))
        sender.shut()
        ingress.socket.close(0)

    _run(case)


def test_what_is_too_much_for_one_message_becomes_several() -> None:
    async def case() -> None:
        ingress, sender = Ingress(), TokenSender(lambda _: None)
        for number in range(3):
            sender.open(f"r{number}", ingress.reply_to(number))
        sender.put([_delta(f"r{number}", *range(700_000)) for number in range(3)])
        assert [len(await ingress.receive()) for _ in range(2)] == [2, 1]
        sender.shut()
        ingress.socket.close(0)

    _run(case)


@pytest.mark.parametrize("leaves", [True, False])
def test_an_ingress_that_is_lost_takes_its_requests_along(leaves: bool) -> None:
    async def case() -> None:
        cancelled: list[str] = []
        ingress, sender = Ingress(), TokenSender(cancelled.append, stall_s=30.0 if leaves else 1.5)
        other = TokenInbox("127.0.0.1")
        healthy = other.open("healthy")
        ends = [sender.open(name, ingress.reply_to(index)) for index, name in enumerate("ab")]
        sender.open("healthy", healthy.reply_to)
        sender.put([_delta("a", 1), _delta("b", 1), _delta("healthy", 1)])
        await ingress.receive()
        if leaves:
            ingress.socket.close(0)
        await _eventually(lambda: len(cancelled) == 2)
        assert cancelled == ["a", "b"]
        for ended in ends:
            with pytest.raises(EngineDeadError, match="gone away" if leaves else "taken no tokens"):
                await ended
        sender.put([_delta("a", 2), _delta("healthy", 2, finish=True)])
        assert (await _read(healthy))[-1].finish_reason == "length"
        sender.shut()
        other.close()
        ingress.socket.close(0)

    _run(case)


def test_a_network_that_is_cut_ends_the_requests_and_both_sides_forget() -> None:
    async def case() -> None:
        cancelled: list[str] = []
        inbox = TokenInbox("127.0.0.1", silence_s=1.0)
        sender = TokenSender(cancelled.append, silence_s=1.0)
        stream = inbox.open("r")
        proxy = CutProxy(stream.reply_to.address)
        await proxy.start()
        ended = sender.open("r", replace(stream.reply_to, address=proxy.address))
        sender.put([_delta("r", 1)])
        async with asyncio.timeout(20):
            assert (await stream.get()).token_ids == (1,)
        proxy.cut()
        sender.put([_delta("r", 2)])
        async with asyncio.timeout(20):
            with pytest.raises(EngineDeadError, match="gone away"):
                await ended
        assert cancelled == ["r"]
        # Nobody tells the ingress: packets that end a connection are lost like others.
        await _eventually(lambda: proxy.closed == {"client": 1, "server": 1})
        sender.close("r")
        proxy.heal()
        again = inbox.open("s")
        sender.open("s", replace(again.reply_to, address=proxy.address))
        sender.put([_delta("s", 3, finish=True)])
        async with asyncio.timeout(20):
            assert [delta.token_ids for delta in await _read(again)] == [(3,)]
        sender.shut()
        inbox.close()
        proxy.close()

    _run(case)


def test_a_short_cut_loses_nothing() -> None:
    async def case() -> None:
        inbox, sender = TokenInbox("127.0.0.1"), TokenSender(lambda _: None)
        stream = inbox.open("r")
        proxy = CutProxy(stream.reply_to.address)
        await proxy.start()
        sender.open("r", replace(stream.reply_to, address=proxy.address))
        for step in range(60):
            if step in (20, 40):
                (proxy.cut if step == 20 else proxy.heal)()
            sender.put([_delta("r", step, finish=step == 59)])
            await asyncio.sleep(0.005)
        async with asyncio.timeout(20):
            deltas = await _read(stream)
        assert [token for delta in deltas for token in delta.token_ids] == list(range(60))
        sender.shut()
        inbox.close()
        proxy.close()

    _run(case)


def test_strangers_are_not_listened_to() -> None:
    async def case() -> None:
        inbox = TokenInbox("127.0.0.1")
        stream = inbox.open("r")
        to = stream.reply_to
        assert to.address.startswith("tcp://127.0.0.1:")
        assert to.secret.hex() not in repr(to)
        good = encode([(to.stream, _delta("r", 1, finish=True))])
        stranger = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        stranger.connect(to.address)
        for frames in (
            [good],
            [b"wrong" * 4, good],
            [to.secret, pickle.dumps([[to.stream]])],
            [to.secret, b"{}"],
            [to.secret, orjson.dumps([[[], 1, 2, 3, 4, 5, 6]])],
            [to.secret, orjson.dumps([[to.stream, 1, None, None, 0, 0, None]])],
            [to.secret, good, b"more"],
        ):
            await stranger.send_multipart(frames)
        await stranger.send_multipart([to.secret, encode([(to.stream, _delta("r", 2, finish=True))])])
        async with asyncio.timeout(20):
            assert [delta.token_ids for delta in await _read(stream)] == [(2,)]
        stranger.close(0)
        inbox.close()

    _run(case)


def test_what_came_before_an_error_is_read_before_it() -> None:
    async def case() -> None:
        inbox = TokenInbox("127.0.0.1")
        stream = inbox.open("r")
        stream.put([stream.reply_to.stream, [1], None, None, 0, 0, None])
        stream.fail(EngineDeadError("it is dead"))
        assert (await stream.get()).token_ids == (1,)
        with pytest.raises(EngineDeadError, match="it is dead"):
            await stream.get()
        inbox.close()

    _run(case)
