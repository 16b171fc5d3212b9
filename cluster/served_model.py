"""One model as the ingress sees it: a `cluster.streaming.ServedModel` over a Serve handle.

Turns Ray's errors into Ballonet's, makes sure that a request nobody reads is cancelled, and gives one whose
group died before its first token to another. The request goes by Serve, its tokens come to a `TokenInbox`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, TypeVar

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from cluster.group import TRIM_S, Refusal
from cluster.request_courier import Handover, RequestCourier
from cluster.token_inbox import TokenInbox, TokenStream
from cluster.tokenizer import Tokenizer
from engine.errors import BallonetError, EngineDeadError, OverloadedError
from engine.messages import EngineInfo, EngineSnapshot, GenerateRequest, TokenDelta
from engine.migration import Migrated

T = TypeVar("T")
_Follow = Callable[[Migrated], DeploymentResponse[Any]]

_ANSWER_S = 2.0  # a group that takes longer to answer a control call is not well
_TRIM_S = TRIM_S + 5.0  # a group answers in TRIM_S whatever its engine does
NO_GROUP_S = 300.0  # longer than a group takes to load, if it can be had at all
LAST_DELTA_S = 10.0  # from the end of a call to its last delta, which left before it
_REROUTE_S = 10.0  # for a group that is known to be dead to leave the router's list: it takes half a second
_REROUTE_PAUSE_S = 0.1


class GroupsOfModel:
    """All TP groups of one model.

    Args:
        model_id: the name clients use.
        created: Unix time of the deployment.
        tokenizer: loaded, so that no request waits for it and its faults show at start.
        handle: of the model's TpGroup deployment.
        inbox, courier: of this process.
        begin_early: see `cluster.early_choice`.
        last_delta_s: how long after the end of a call its last delta may come.
        no_group_s: how long a request waits where no group is up.
    """

    def __init__(  # noqa: PLR0913 - parts of the process, and how long to wait
        self,
        model_id: str,
        created: int,
        tokenizer: Tokenizer,
        handle: DeploymentHandle[Any],
        inbox: TokenInbox,
        courier: RequestCourier,
        begin_early: Callable[[GenerateRequest, Handover], bool] = lambda request, handover: False,
        last_delta_s: float = LAST_DELTA_S,
        no_group_s: float = NO_GROUP_S,
    ) -> None:
        self.model_id = model_id
        self.created = created
        self._tokenizer = tokenizer
        self._handle = handle
        self._generate = handle.options(method_name="generate")
        self._attend = handle.options(method_name="attend")
        self._inbox = inbox
        self._courier = courier
        self._begin_early = begin_early
        self._last_delta_s = last_delta_s
        self._no_group_s = no_group_s
        self._info: EngineInfo | None = None

    async def info(self) -> EngineInfo:
        """Facts of the engines; all groups of a model are alike. Raises EngineDeadError."""
        if self._info is None:
            infos = await answers_of(self._handle, EngineInfo, "info")
            if not infos:
                raise EngineDeadError(f"no group of {self.model_id} answers")
            self._info = infos[0]
        return self._info

    async def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        """The request's deltas from one group; another one's, if the first died before any.

        Raises:
            RequestError, OverloadedError, EngineDeadError
        """
        call, delta = await self._begin(request)
        try:
            while delta.finish_reason is None:
                yield delta
                delta = await call.stream.get()
            call.has_ended = True
            yield delta
        finally:
            call.close()

    async def _begin(self, request: GenerateRequest) -> tuple[_Call, TokenDelta]:
        """A call and its first delta. A group that dies may have died of the request: it gets a second
        one, and no third."""
        loop = asyncio.get_running_loop()
        num_begun, refused_s = 0, float("inf")  # since when only groups have refused it that were dead before
        while True:
            stream = self._inbox.open(request.request_id)
            call = _Call(self.model_id, stream, self._last_delta_s, self._follow(request, stream))
            handover = Handover(self._courier, request, stream, call.keep)
            call.send(self._generate, handover, request, self._begin_early(request, handover))
            try:
                return call, await self._first(call)
            except _GroupDiedError as death:
                call.close()
                was_begun = death.was_begun or call.was_begun
                num_begun += was_begun
                refused_s = float("inf") if was_begun else min(refused_s, loop.time())
                if num_begun > 1 or loop.time() - refused_s > _REROUTE_S:
                    raise
            except BaseException:
                call.close()
                raise
            await asyncio.sleep(_REROUTE_PAUSE_S)

    def _follow(self, request: GenerateRequest, stream: TokenStream) -> _Follow:
        """What calls the group that a request has moved to. Its tokens come to the same stream."""
        return lambda moved: self._attend.remote(moved, request.request_id, stream.reply_to)

    async def _first(self, call: _Call) -> TokenDelta:
        """The first delta. A group may take long to come to it; but Serve would wait forever for a group."""
        while True:
            try:
                async with asyncio.timeout(self._no_group_s):
                    return await call.stream.get()
            except TimeoutError:
                if not await self._is_up():
                    raise EngineDeadError(
                        f"no group of {self.model_id} has been up for this request; try again later"
                    ) from None

    async def _is_up(self) -> bool:
        """Whether there is a group, however long it takes to answer."""
        try:
            response = self._handle.broadcast("info")
            return bool(await response.results_async(timeout_s=_ANSWER_S, return_exceptions=True))
        except TimeoutError:
            return True
        except DeploymentUnavailableError:
            return False

    async def is_healthy(self) -> bool:
        """Whether at least one engine answers."""
        return bool(await self.snapshot())

    async def snapshot(self) -> list[EngineSnapshot]:
        """Of every engine that answers in time, fresh: the groups are asked, 7 ms for one of them."""
        return await snapshots_of(self._handle)

    async def trim(self, drop_cache: bool) -> list[int | BallonetError]:
        """The bytes that each engine gave back, or why it did not; empty if no group is up."""
        answers = await _broadcast(self._handle, _TRIM_S, "trim", drop_cache)
        return [
            answer.error
            if isinstance(answer, Refusal)
            else answer
            if isinstance(answer, int)
            else EngineDeadError(f"a group of {self.model_id} did not answer")
            for answer in answers
        ]


class _GroupDiedError(EngineDeadError):
    """The group of a request is dead; `was_begun` as in Refusal. Stays within this process."""

    def __init__(self, message: str, was_begun: bool) -> None:
        super().__init__(message)
        self.was_begun = was_begun


class _Call:
    """One attempt at one request: a call of a group that is open as long as it, and the stream it fills.

    The last delta ends the stream. The end of the call, which may come before it, matters if it is an error,
    or if the request has moved to another group, which is called then: all tokens of the first one are here,
    and the other one says none before.
    """

    def __init__(self, model_id: str, stream: TokenStream, last_delta_s: float, follow: _Follow) -> None:
        self.stream = stream
        self.has_ended = False
        self._model_id = model_id
        self._last_delta_s = last_delta_s
        self._is_kept = False
        self._follow = follow
        self._timer: asyncio.TimerHandle | None = None

    def send(self, generate: Any, handover: Handover, request: GenerateRequest, is_begun: bool) -> None:
        """Make the call; where an engine has begun, once its first token has passed."""
        self._handover = handover
        self._response: DeploymentResponse[Any] | None = None
        if not is_begun:
            self._response = generate.remote(request, handover)
        self._task = asyncio.create_task(self._watch(lambda: generate.remote(request, handover)))

    @property
    def was_begun(self) -> bool:
        """Whether an engine may have had the request before the call came there."""
        return self._handover.was_begun

    def keep(self) -> None:
        """The request goes on without the call, which was refused too late."""
        self._is_kept = True
        self._end_call()

    def close(self) -> None:
        """Nobody reads any more: cancel what has not ended."""
        self.stream.close()
        if self._timer is not None:
            self._timer.cancel()
        self._handover.close(self.has_ended)
        if not self.has_ended and self._timer is None and not self._task.done():
            self._end_call()

    def _end_call(self) -> None:
        # Dropping the response is not enough: measured with Ray 2.60, the group generates on.
        if self._response is not None:
            self._response.cancel()
        self._task.cancel()

    async def _watch(self, call: Callable[[], DeploymentResponse[Any]]) -> None:
        try:
            if self._response is None:
                await self._handover.pause()
                self._response = call()
            refusal: Refusal | Migrated | None = await self._response
            while isinstance(refusal, Migrated):
                self._response = self._follow(refusal)
                refusal = await self._response
        except Exception as error:
            if not self._is_kept:
                self.stream.fail(self._explain(error))
            return
        if refusal is None:
            lost = _GroupDiedError("the engine ended this request, but its last tokens have not come", True)
            if not self.has_ended:
                self._timer = asyncio.get_running_loop().call_later(
                    self._last_delta_s, self.stream.fail, lost
                )
        elif isinstance(refusal.error, EngineDeadError):
            self.stream.fail(_GroupDiedError(str(refusal.error), refusal.was_begun))
        else:
            self.stream.fail(refusal.error)

    def _explain(self, error: Exception) -> Exception:
        if isinstance(error, BackPressureError):
            return OverloadedError(f"all groups of {self._model_id} are full: {error.message}")
        if isinstance(error, RayActorError):
            return _GroupDiedError(f"the group that served this request of {self._model_id} ended", True)
        if isinstance(error, DeploymentUnavailableError):
            return EngineDeadError(f"no group of {self._model_id} can be had: {error}")
        return error


async def snapshots_of(handle: DeploymentHandle[Any]) -> list[EngineSnapshot]:
    """Snapshots of all groups behind `handle` that answer in time."""
    return await answers_of(handle, EngineSnapshot, "snapshot")


async def answers_of(
    handle: DeploymentHandle[Any], kind: type[T], method: str, *arguments: object
) -> list[T]:
    """What the groups behind `handle` answer to a control call, as far as it is of that kind, in time."""
    answers = await _broadcast(handle, _ANSWER_S, method, *arguments)
    return [answer for answer in answers if isinstance(answer, kind)]


async def _broadcast(
    handle: DeploymentHandle[Any], timeout_s: float, method: str, *arguments: object
) -> Sequence[Any]:
    """What each group answers, errors included; nothing if one of them takes longer than `timeout_s`."""
    # A broadcast passes by the queue that a plain call would wait in behind the requests.
    response = handle.broadcast(method, *arguments)
    try:
        answers: Sequence[Any] = await response.results_async(timeout_s=timeout_s, return_exceptions=True)
    except (TimeoutError, DeploymentUnavailableError):  # the latter while no group is up yet
        return []
    return answers
