"""Takes parked requests from one engine to another, in the event loops of both their actors.

    source: leave -> (copy what is on the device alone) -> send -> pack -> let go
    target: prepare        ->                  bytes come -> take in -> adopt, when the ingress calls

Until the target has said that it has everything, the request is the source's: whatever fails, it waits there
for its turn as before. From then on it is the target's, which says nothing before the ingress calls for it.
At no moment two engines speak for one request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

from engine.errors import BallonetError, DriverError, EngineDeadError
from engine.migration import Accepted, Declined, Migrated, MigrationOffer, MigrationResult, SequenceState
from engine.token_sender import TokenSender

if TYPE_CHECKING:
    from engine.core import Engine  # which loads torch

T = TypeVar("T")
logger = logging.getLogger(__name__)

_SOON_S, _LATER_S = 0.002, 0.02  # between two looks at a transfer, which costs the engine a step's beginning
_RECEIPT_S = 5.0  # for an ingress to take the source's last tokens; one that is slower keeps its request here
_EXPIRY_S = 1.0


class Peer(Protocol):
    """The target, as the source calls it. Every method raises BallonetError if it does not answer."""

    async def prepare(self, offer: MigrationOffer) -> Accepted | Declined: ...

    async def take_in(self, migration_id: str, state: SequenceState) -> Declined | None: ...

    async def forget(self, migration_id: str) -> None: ...


class Migrator:
    """Both ends of migrations, for one engine. Implements `Peer` for its own.

    Args:
        engine: whose sequences they are.
        sender: of its tokens.
        is_claimed: whether somebody would hear of it if a request moved.
    """

    def __init__(self, engine: Engine, sender: TokenSender, is_claimed: Callable[[str], bool]) -> None:
        self._engine = engine
        self._books = engine.migrations
        self._sender = sender
        self._is_claimed = is_claimed
        self._expiry: asyncio.Task[None] | None = None

    async def send(
        self, peer: Peer, group_id: str, request_id: str | None = None, min_stay_s: float = 0.0
    ) -> MigrationResult:
        """Move one parked request to another engine.

        Args:
            group_id: of the target, for the request's ingress.
            request_id: None is the one whose client has waited longest, of those that can move.
            min_stay_s: one that came here by a migration stays so long.
        """
        started_s = time.monotonic()
        offer = await self._do(lambda: self._books.leave(request_id, min_stay_s))
        if isinstance(offer, Declined):
            return MigrationResult(offer.outcome, offer.reason, request_id or "")
        name, number = offer.request_id, offer.migration_id
        has_gone = False
        try:
            declined = await self._hand(peer, offer)
            if declined is None and not self._is_claimed(name):
                declined = Declined("not_movable", "no call would tell its client's ingress")
            if declined is None:
                has_gone = await self._do(lambda: self._books.let_go(number))
        except BallonetError as error:
            declined = Declined("failed", str(error))
        finally:
            if not has_gone:
                await self._stay(peer, number)
        if has_gone and self._sender.hand_over(name, Migrated(number, group_id)):
            num_bytes = offer.num_rows * self._books.row_bytes
            return MigrationResult("migrated", "", name, num_bytes, time.monotonic() - started_s)
        if has_gone:  # its client has left in this moment
            await self._stay(peer, number)
        why = declined or Declined("failed", "the request ended meanwhile")
        return MigrationResult(why.outcome, why.reason, name, 0, time.monotonic() - started_s)

    async def prepare(self, offer: MigrationOffer) -> Accepted | Declined:
        """Make room for a sequence of another engine."""
        answer = await self._do(lambda: self._books.prepare(offer))
        if self._expiry is None or self._expiry.done():
            self._expiry = asyncio.create_task(self._expire())
        return answer

    async def take_in(self, migration_id: str, state: SequenceState) -> Declined | None:
        """All of a sequence has come, or will have in a moment; None if it is safe here."""
        try:
            await self._until(lambda: self._books.is_through(migration_id))
            await self._try(lambda: self._books.take_in(migration_id, state))
        except DriverError as error:
            return Declined("failed", str(error))
        return None

    async def forget(self, migration_id: str) -> None:
        """A sequence does not come."""
        await self._do(lambda: self._books.forget(migration_id))

    async def adopt(self, migration_id: str) -> None:
        """Its ingress calls for a sequence, and takes its tokens from now on.

        Raises:
            EngineDeadError: it is not here: nobody called for it in time, or this engine is another one.
        """
        if not await self._do(lambda: self._books.adopt(migration_id)):
            raise EngineDeadError("the request that was to move here is not here")

    async def _hand(self, peer: Peer, offer: MigrationOffer) -> Declined | None:
        """Everything up to the target's word that it has all of it; None, or why not.

        Raises:
            BallonetError: somebody does not answer, or a copy failed.
        """
        number = offer.migration_id
        await self._until(lambda: self._books.is_saved(number))
        answer = await peer.prepare(offer)
        if isinstance(answer, Declined):
            return answer
        await self._try(lambda: self._books.send(number, answer.doors))
        await self._until(lambda: self._books.is_through(number))
        state = await self._do(lambda: self._books.pack(number))
        if state is None:
            return Declined("failed", "the request ended meanwhile")
        try:
            async with asyncio.timeout(_RECEIPT_S):
                await self._sender.acknowledged(offer.request_id)
        except TimeoutError:
            return Declined("failed", "the request's ingress is slow to take its tokens")
        return await peer.take_in(number, state)

    async def _stay(self, peer: Peer, migration_id: str) -> None:
        with contextlib.suppress(BallonetError):  # an engine that has ended keeps nobody
            await self._do(lambda: self._books.stay(migration_id))
        with contextlib.suppress(BallonetError):  # it forgets by itself
            await peer.forget(migration_id)

    async def _do(self, run: Callable[[], T]) -> T:
        """Have something done between two steps, that does not fail. Raises EngineDeadError."""
        try:
            return await asyncio.wrap_future(self._engine.between_steps(run))
        except asyncio.CancelledError:
            self._engine.check_alive()  # a loop that has ended cancels what it did not come to
            raise

    async def _try(self, run: Callable[[], T]) -> T:
        """The same for what may raise DriverError: an error there would end the engine."""
        errors: list[DriverError] = []

        def attempt() -> T | None:
            try:
                return run()
            except DriverError as error:
                errors.append(error)
                return None

        result = await self._do(attempt)
        if errors:
            raise errors[0]
        return result  # type: ignore[return-value]

    async def _until(self, holds: Callable[[], bool]) -> None:
        """Return once that holds. Raises DriverError if it never will."""
        pause_s = _SOON_S
        while not await self._try(holds):
            await asyncio.sleep(pause_s)
            pause_s = min(_LATER_S, 1.5 * pause_s)

    async def _expire(self) -> None:
        while self._books.num_coming:
            await asyncio.sleep(_EXPIRY_S)
            with contextlib.suppress(EngineDeadError):
                await self._do(self._books.expire)
