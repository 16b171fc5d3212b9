"""One model as the ingress sees it: a `cluster.streaming.ServedModel` over a Serve handle.

Turns Ray's errors into Ballonet's and makes sure that a stream nobody reads is cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any, TypeVar

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from cluster.group import TRIM_S, Refusal
from cluster.tokenizer import Tokenizer
from engine.errors import BallonetError, EngineDeadError, OverloadedError
from engine.messages import EngineInfo, EngineSnapshot, GenerateRequest, TokenDelta

T = TypeVar("T")

_ANSWER_S = 2.0  # a group that takes longer to answer a control call is not well
_TRIM_S = TRIM_S + 5.0  # a group answers in TRIM_S whatever its engine does


class GroupsOfModel:
    """All TP groups of one model.

    Args:
        model_id: the name clients use.
        created: Unix time of the deployment.
        tokenizer: loaded, so that no request waits for it and its faults show at start.
        handle: of the model's TpGroup deployment.
    """

    def __init__(
        self, model_id: str, created: int, tokenizer: Tokenizer, handle: DeploymentHandle[Any]
    ) -> None:
        self.model_id = model_id
        self.created = created
        self._tokenizer = tokenizer
        self._handle = handle
        self._stream = handle.options(method_name="generate", stream=True)
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
        """The request's deltas from one group.

        Raises:
            RequestError, OverloadedError, EngineDeadError
        """
        response = self._stream.remote(request)
        has_ended = False
        try:
            async for item in response:
                if isinstance(item, Refusal):
                    raise item.error
                has_ended = item.finish_reason is not None
                yield item
        except (GeneratorExit, asyncio.CancelledError):
            # Dropping the response is not enough: measured with Ray 2.60, the group generates on.
            if not has_ended:
                response.cancel()
            raise
        except BackPressureError as error:
            raise OverloadedError(f"all groups of {self.model_id} are full: {error.message}") from error
        except (RayActorError, DeploymentUnavailableError) as error:
            raise EngineDeadError(f"the group that served this request of {self.model_id} ended") from error

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
