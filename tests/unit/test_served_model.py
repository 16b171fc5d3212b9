"""A model's groups as the ingress calls them, with a handle that plays what groups do."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentID

from cluster import served_model
from cluster.group import Refusal
from cluster.request_courier import Handover, RequestCourier
from cluster.served_model import GroupsOfModel
from cluster.token_inbox import TokenInbox
from engine.errors import EngineDeadError, OverloadedError, RequestError
from engine.messages import GenerateRequest, ReplyTo, TokenDelta
from engine.migration import Migrated
from engine.token_sender import TokenSender
from tests.unit.ingress_fakes import byte_tokenizer

Answer = Refusal | Migrated | None
Group = Callable[["Handle", GenerateRequest, ReplyTo], Awaitable[Answer]]
REQUEST = GenerateRequest("r", (1, 2))
DEAD = EngineDeadError("the engine's process ended")


class Response:
    def __init__(self, task: asyncio.Task[Answer]) -> None:
        self._task = task

    def __await__(self) -> Any:
        return self._task.__await__()

    def cancel(self) -> None:
        self._task.cancel()


class Broadcast:
    def __init__(self, is_up: bool) -> None:
        self._is_up = is_up

    async def results_async(self, timeout_s: float, return_exceptions: bool) -> list[str]:
        if not self._is_up:
            raise DeploymentUnavailableError(DeploymentID("m"))
        return ["info"]


class Handle:
    """The nth call goes to the nth group, the last one takes all further ones."""

    def __init__(self, *groups: Group) -> None:
        self.calls: list[asyncio.Task[Answer]] = []
        self.handovers: list[Handover] = []
        self.sender = TokenSender(lambda _: None)
        self.is_up = True
        self.followed: list[Migrated] = []
        self._groups = groups

    def options(self, method_name: str) -> Handle | Attend:
        return self if method_name == "generate" else Attend(self)

    def broadcast(self, method: str) -> Broadcast:
        return Broadcast(self.is_up)

    def remote(self, request: GenerateRequest, handover: Handover) -> Response:
        self.handovers.append(handover)
        reply_to = pickle.loads(pickle.dumps(handover))
        assert reply_to == handover._stream.reply_to
        return self.call(request, reply_to)

    def call(self, request: GenerateRequest, reply_to: ReplyTo) -> Response:
        group = self._groups[min(len(self.calls), len(self._groups) - 1)]
        self.calls.append(asyncio.ensure_future(group(self, request, reply_to)))
        return Response(self.calls[-1])


class Attend:
    """Calls of those to whom a request has moved: in the order of the groups, like all others."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    def remote(self, moved: Migrated, request_id: str, reply_to: ReplyTo) -> Response:
        self._handle.followed.append(moved)
        return self._handle.call(GenerateRequest(request_id, (1,)), reply_to)


def refuses(error: Exception, was_begun: bool = True) -> Group:
    async def group(handle: Handle, request: GenerateRequest, reply_to: ReplyTo) -> Refusal:
        return Refusal(error, was_begun)  # type: ignore[arg-type]

    return group


async def dies(handle: Handle, request: GenerateRequest, reply_to: ReplyTo) -> Refusal:
    raise ActorDiedError()


def answers(num_tokens: int, then: Answer = None, first: int = 0) -> Group:
    """So many tokens, and the end unless something else comes then."""

    async def group(handle: Handle, request: GenerateRequest, reply_to: ReplyTo) -> Answer:
        ended = handle.sender.open(request.request_id, reply_to)
        for index in range(first, first + num_tokens):
            is_last = then is None and index == first + num_tokens - 1
            handle.sender.put([TokenDelta("r", (index,), finish_reason="length" if is_last else None)])
            await asyncio.sleep(0.02)
        if then is None:
            await ended
        else:
            await handle.sender.acknowledged(request.request_id)
        handle.sender.close(request.request_id)
        return then

    return group


async def forgets(handle: Handle, request: GenerateRequest, reply_to: ReplyTo) -> None:
    """A call that ends well without a last delta."""


async def hangs(handle: Handle, request: GenerateRequest, reply_to: ReplyTo) -> None:
    await asyncio.Event().wait()


def _ask(handle: Handle, leave_after: int = 100, is_early: bool = False) -> list[int]:
    """The tokens of one request; an early one has begun before the call."""

    async def ask() -> list[int]:
        inbox, tokens = TokenInbox("127.0.0.1"), []
        model = GroupsOfModel(
            "m",
            0,
            byte_tokenizer(),
            cast(Any, handle),
            inbox,
            RequestCourier(),
            lambda request, handover: is_early,
            last_delta_s=0.1,
        )
        deltas = model.generate(REQUEST)
        try:
            async with asyncio.timeout(20):
                async for delta in deltas:
                    tokens += delta.token_ids
                    if len(tokens) >= leave_after:
                        break
        finally:
            await deltas.aclose()
            handle.sender.shut()
            inbox.close()
            if handle.calls:
                await asyncio.wait(handle.calls, timeout=20)
        return tokens

    return asyncio.run(ask())


def test_the_tokens_of_the_group() -> None:
    assert _ask(Handle(answers(5))) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("death", [refuses(DEAD), dies])
def test_a_group_that_dies_before_the_first_token_is_replaced_once(death: Group) -> None:
    assert _ask(Handle(death, answers(3))) == [0, 1, 2]
    poisoned = Handle(death, death, answers(3))
    with pytest.raises(EngineDeadError):
        _ask(poisoned)
    assert len(poisoned.calls) == 2


def test_a_group_that_was_dead_before_is_passed_by() -> None:
    dead = refuses(DEAD, was_begun=False)
    assert _ask(Handle(dead, dead, dead, refuses(DEAD), dead, answers(3))) == [0, 1, 2]


def test_what_an_engine_had_before_its_call_came_counts_as_begun() -> None:
    """Such a request may have ended the engine, though its group knew of the death when the call came."""

    async def had_it(handle: Handle, request: GenerateRequest, reply_to: ReplyTo) -> Refusal:
        handle.handovers[-1].was_begun = True
        return Refusal(DEAD, was_begun=False)

    poisoned = Handle(had_it, had_it, answers(3))
    with pytest.raises(EngineDeadError):
        _ask(poisoned)
    assert len(poisoned.calls) == 2


def test_a_group_that_dies_after_a_token_ends_the_stream() -> None:
    handle = Handle(answers(2, Refusal(DEAD)), answers(3))
    with pytest.raises(EngineDeadError, match="process ended"):
        _ask(handle)
    assert len(handle.calls) == 1


def test_a_request_that_moves_is_followed_and_its_stream_goes_on() -> None:
    moves = [Migrated(f"m{at}", f"group{at}") for at in range(2)]
    handle = Handle(answers(3, moves[0]), answers(2, moves[1], first=3), answers(4, first=5))
    assert _ask(handle) == list(range(9))
    assert handle.followed == moves
    assert len(handle.calls) == 3


@pytest.mark.parametrize("end", [refuses(DEAD), dies])
def test_a_group_that_dies_with_a_request_that_moved_there_ends_the_stream(end: Group) -> None:
    handle = Handle(answers(3, Migrated("m", "other")), end, answers(3))
    with pytest.raises(EngineDeadError, match="ended"):
        _ask(handle)
    assert len(handle.calls) == 2


def test_a_reader_that_leaves_cancels_where_the_request_is_now() -> None:
    handle = Handle(answers(2, Migrated("m", "other")), answers(1000, first=2))
    assert len(_ask(handle, leave_after=4)) >= 4
    assert not handle.calls[0].cancelled()
    assert handle.calls[1].cancelled()


@pytest.mark.parametrize("error", [RequestError("wrong", "prompt"), OverloadedError("full", 7.0)])
def test_refusals_are_not_tried_again(error: Exception) -> None:
    handle = Handle(refuses(error), answers(3))
    with pytest.raises(type(error), match=str(error)):
        _ask(handle)
    assert len(handle.calls) == 1


def test_a_last_delta_that_never_comes_is_not_waited_for() -> None:
    assert _ask(Handle(forgets, answers(3))) == [0, 1, 2]  # nothing was sent: another try
    handle = Handle(forgets)
    with pytest.raises(EngineDeadError, match="last tokens have not come"):
        _ask(handle)
    assert len(handle.calls) == 2


def test_a_request_that_has_waited_long_is_given_to_another_group_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(served_model, "_REROUTE_S", 0.05)

    async def dies_late(handle: Handle, request: GenerateRequest, reply_to: ReplyTo) -> Refusal:
        await asyncio.sleep(0.2)
        return Refusal(DEAD)

    assert _ask(Handle(dies_late, answers(3))) == [0, 1, 2]


def test_a_group_that_stays_dead_is_not_tried_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_model, "_REROUTE_S", 0.05)
    with pytest.raises(EngineDeadError, match="process ended"):
        _ask(Handle(refuses(DEAD, was_begun=False)))


def test_a_reader_that_leaves_cancels_the_call() -> None:
    handle = Handle(answers(1000))
    assert len(_ask(handle, leave_after=2)) >= 2
    assert handle.calls[0].cancelled()


def test_a_reader_that_gives_up_waiting_cancels_the_call() -> None:
    async def ask() -> None:
        handle, inbox = Handle(hangs), TokenInbox("127.0.0.1")
        model = GroupsOfModel("m", 0, byte_tokenizer(), cast(Any, handle), inbox, RequestCourier())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(model.generate(REQUEST)), 0.1)
        await asyncio.wait(handle.calls, timeout=20)
        assert handle.calls[0].cancelled()
        inbox.close()

    asyncio.run(ask())


@pytest.mark.parametrize("is_up", [True, False])
def test_a_request_waits_for_a_group_that_is_busy_and_not_for_one_that_never_comes(is_up: bool) -> None:
    async def late(handle: Handle, request: GenerateRequest, reply_to: ReplyTo) -> Refusal | None:
        await asyncio.sleep(1.0)
        return await answers(1)(handle, request, reply_to)

    async def ask() -> list[int]:
        handle, inbox = Handle(late), TokenInbox("127.0.0.1")
        handle.is_up = is_up
        model = GroupsOfModel(
            "m", 0, byte_tokenizer(), cast(Any, handle), inbox, RequestCourier(), no_group_s=0.1
        )
        try:
            return [token async for delta in model.generate(REQUEST) for token in delta.token_ids]
        finally:
            await asyncio.wait(handle.calls, timeout=20)
            handle.sender.shut()
            inbox.close()

    if is_up:
        assert asyncio.run(ask()) == [0]
    else:
        with pytest.raises(EngineDeadError, match="no group of m has been up"):
            asyncio.run(ask())


def test_a_call_that_comes_later_is_as_good() -> None:
    handle = Handle(answers(3))
    assert _ask(handle, is_early=True) == [0, 1, 2]
    assert len(handle.calls) == 1
    with pytest.raises(EngineDeadError):
        _ask(Handle(dies, dies), is_early=True)


def test_a_reader_that_leaves_before_the_call_prevents_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def pause(self: Handover) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(Handover, "pause", pause)

    async def scenario() -> None:
        handle, inbox = Handle(answers(3)), TokenInbox("127.0.0.1")
        model = GroupsOfModel(
            "m", 0, byte_tokenizer(), cast(Any, handle), inbox, RequestCourier(), lambda *_: True
        )
        reader = asyncio.ensure_future(anext(model.generate(REQUEST)))
        await asyncio.sleep(0.05)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        await asyncio.sleep(0.05)
        assert not handle.calls
        inbox.close()

    asyncio.run(scenario())
