"""Parked sequences that go to another engine or come from one: the engine's side, between its steps.

A sequence that may go stays parked, and is everything it was: it can be cancelled, it can end with its
engine, and it stays if anything goes wrong. One that comes has host memory and a seat from the start, is
nobody's until it is called for (`adopt`), and is forgotten if nobody does. Who talks to the other engine is
`engine.migrator`.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.config import EngineConfig
from engine.errors import DriverError
from engine.memory.blocks import TokenChain
from engine.memory.passages import Passage
from engine.memory.pool import MemoryPool
from engine.messages import EngineInfo
from engine.migration import Accepted, Declined, Door, KvShape, MigrationOffer, SequenceState
from engine.outlet import Entry, Outlet
from engine.scheduler import Scheduler
from engine.sequence import Sequence as EngineSequence
from engine.sequence import State

logger = logging.getLogger(__name__)

UNCLAIMED_S = 30.0  # for the source's word, and then for the ingress to call: each takes milliseconds


@dataclass(slots=True, eq=False)
class _Leaving:
    """A sequence that may be about to go.

    Attributes:
        held: its tokens that are not handed out, once they are to travel with it.
    """

    seq: EngineSequence
    passage: Passage
    held: list[Entry]


@dataclass(slots=True, eq=False)
class _Coming:
    """A sequence that may be about to run here.

    Attributes:
        waits_s: since when all its bytes are here.
        state: there once it waits to be called for.
    """

    offer: MigrationOffer
    passage: Passage
    seat: int
    waits_s: float | None = None
    state: SequenceState | None = None


class Migrations:
    """All sequences of one engine that are under way. Every method runs in the engine's thread.

    Args:
        pool, scheduler, outlet: of the engine.
        open_ids, door: requests that are submitted and have not ended; changed behind the door.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        config: EngineConfig,
        info: EngineInfo,
        pool: MemoryPool,
        scheduler: Scheduler,
        outlet: Outlet,
        open_ids: set[str],
        door: threading.Lock,
        clock: Callable[[], float],
    ) -> None:
        self.shape = shape_of(config, info, pool)
        self._info = info
        self._holds_back = config.scheduler.deposit
        self._pool = pool
        self._scheduler = scheduler
        self._outlet = outlet
        self._open_ids = open_ids
        self._door = door
        self._clock = clock
        self._leaving: dict[str, _Leaving] = {}
        self._coming: dict[str, _Coming] = {}

    @property
    def row_bytes(self) -> int:
        """KV of T tokens in every layer, of all ranks."""
        parking = self._pool.parking
        return parking.host.row_bytes * self.shape.num_ranks if parking is not None else 0

    @property
    def num_leaving(self) -> int:
        """Sequences that may be about to go, and do not come back to the device meanwhile."""
        return len(self._leaving)

    @property
    def num_coming(self) -> int:
        """Sequences that have host memory here and have not been called for."""
        return len(self._coming)

    def leave(self, request_id: str | None, min_stay_s: float) -> MigrationOffer | Declined:
        """Begin to move a parked sequence.

        Args:
            request_id: None is the one whose client has waited longest, of those that can move.
            min_stay_s: one that came from another engine stays so long.
        """
        now_s, scheduler = self._clock(), self._scheduler
        seq = scheduler.get(request_id) if request_id is not None else None
        if request_id is not None and seq is None:
            return Declined("not_movable", "there is no such request")
        late_first = sorted(scheduler.turns.parked, key=lambda one: scheduler.turns.slack_s(one, now_s))
        reason = "nobody is parked"
        for one in late_first if seq is None else [seq]:
            reason = self._hindrance(one, now_s - min_stay_s)
            if not reason:
                return self._offer(one)
        return Declined("not_movable", reason)

    def is_saved(self, migration_id: str) -> bool:
        """Whether all of a sequence is in the balloon. Raises DriverError if a copy was refused."""
        return self._leaving[migration_id].passage.is_saved

    def send(self, migration_id: str, doors: Sequence[Door]) -> None:
        """Begin to send a sequence's bytes."""
        if self._pool.passages is not None:
            self._pool.passages.send(self._leaving[migration_id].passage, doors)

    def is_through(self, migration_id: str) -> bool:
        """Whether all bytes are at the target; at the target, whether all have come.

        Raises:
            DriverError: they have not, and will not.
        """
        under_way = self._leaving.get(migration_id) or self._coming.get(migration_id)
        if under_way is None:
            raise DriverError("KV transfer", "it is not wanted any more")
        return under_way.passage.is_through

    def pack(self, migration_id: str) -> SequenceState | None:
        """What the sequence is but for its KV, its tokens that are held back included; None if it has ended.
        From now on it says nothing here, unless it stays or ends.
        """
        leaving = self._leaving[migration_id]
        seq = leaving.seq
        if not self._is_here(seq):
            return None
        now_s = self._clock()
        leaving.held += self._outlet.take(seq.request_id)
        return SequenceState(
            seq.request,
            seq.seed,
            tuple(seq.output_token_ids),
            seq.longest(self._info.max_model_len),
            now_s - seq.arrival_s,
            now_s - (seq.first_token_s if seq.first_token_s is not None else now_s),
            seq.ttft_slo_s,
            seq.tpot_slo_s,
            seq.num_preemptions,
            seq.num_cached_tokens,
            seq.num_migrations + 1,
            tuple((due_s - now_s, delta) for delta, due_s in leaving.held),
        )

    def stay(self, migration_id: str) -> None:
        """It does not go: it waits here for its turn as before, unless it has ended."""
        leaving = self._leaving.pop(migration_id, None)
        if leaving is None or self._pool.passages is None:
            return
        self._pool.passages.end(leaving.passage)
        if leaving.held and self._is_here(leaving.seq):
            self._outlet.put(leaving.held, self._holds_back and self._scheduler.takes_turns)

    def let_go(self, migration_id: str) -> bool:
        """The target has everything: it is none of this engine's any more. False if it has ended since."""
        leaving = self._leaving.pop(migration_id)
        is_here = self._is_here(leaving.seq)
        if is_here:
            self._scheduler.let_go(leaving.seq)
            self._close_id(leaving.seq.request_id)
        if self._pool.passages is not None:
            self._pool.passages.end(leaving.passage)
        return is_here

    def prepare(self, offer: MigrationOffer) -> Accepted | Declined:
        """Take host memory and a seat for another engine's sequence."""
        passages, free_seats = self._pool.passages, self._scheduler.free_seats
        if passages is None:
            return Declined("refused", "there is no balloon here")
        if differs := self.shape.difference(offer.shape):
            return Declined("refused", differs)
        if offer.longest > self._info.max_model_len:
            return Declined("refused", f"it may have {offer.longest} tokens: {self._info.max_model_len} here")
        if not free_seats:
            return Declined("refused", "as many sequences are here as may be")
        if not self._open_id(offer.request_id):
            return Declined("refused", "a request with its id is open here")
        try:
            taken = passages.come(offer.num_rows)
        except DriverError as error:
            self._close_id(offer.request_id)
            return Declined("failed", str(error))
        if taken is None:
            self._close_id(offer.request_id)
            return Declined("refused", f"the balloon has no room for {offer.num_rows} rows")
        passage, doors = taken
        self._coming[offer.migration_id] = _Coming(offer, passage, free_seats.pop())
        return Accepted(doors)

    def take_in(self, migration_id: str, state: SequenceState) -> None:
        """All that the sequence is has come; it waits to be called for.

        Raises:
            DriverError: its bytes have not come, or nobody waits for it any more.
        """
        coming = self._coming.get(migration_id)
        if coming is None or not coming.passage.is_through:
            raise DriverError("KV transfer", "the bytes have not come, or came too late")
        coming.state, coming.waits_s = state, self._clock()

    def adopt(self, migration_id: str) -> bool:
        """The ingress calls for a sequence: it is parked here from now on, and comes back in its turn. False
        if it is not there (any more).
        """
        coming = self._coming.get(migration_id)
        if coming is None or coming.state is None or self._pool.passages is None:
            return False
        del self._coming[migration_id]
        seq = self._sequence(coming.state, coming.seat)
        self._pool.passages.arrived(coming.passage, seq.backing)
        self._scheduler.take_in(seq)
        now_s = self._clock()
        held = [(delta, now_s + due_s) for due_s, delta in coming.state.held]
        if held:
            self._outlet.put(held, self._holds_back and self._scheduler.takes_turns)
        return True

    def forget(self, migration_id: str) -> None:
        """A sequence does not come, or nobody called for it."""
        coming = self._coming.pop(migration_id, None)
        if coming is not None and self._pool.passages is not None:
            self._pool.passages.end(coming.passage)
            self._scheduler.free_seats.append(coming.seat)
            self._close_id(coming.offer.request_id)

    def expire(self, unclaimed_s: float = UNCLAIMED_S) -> None:
        """Forget sequences that did not come, or were not called for, in time."""
        now_s = self._clock()
        for migration_id, coming in list(self._coming.items()):
            try:
                is_there = (
                    coming.passage.is_through
                )  # bytes that do not come end by themselves, with an error
            except DriverError as error:
                logger.warning("request %s does not come: %s", coming.offer.request_id, error)
                self.forget(migration_id)
                continue
            if is_there and coming.waits_s is None:
                coming.waits_s = now_s
            elif coming.waits_s is not None and now_s - coming.waits_s > unclaimed_s:
                self.forget(migration_id)

    def _hindrance(self, seq: EngineSequence, came_before_s: float) -> str:
        """Why a sequence cannot move now; empty if it can."""
        backing, passages = seq.backing, self._pool.passages
        if passages is None:
            return "there is no balloon to move it from"
        if seq.state is not State.PARKED:
            return f"it is {seq.state.value}, not parked"
        if backing.is_leaving or seq.num_in_flight:
            return "it is on its way to the balloon"
        if backing.coming is not None:
            return "it is on its way back to the device"
        if backing.has_failed or backing.is_lost:
            return "its KV could not be copied"
        if passages.is_leaving(backing):
            return "it is moving already"
        return "it came from another engine a moment ago" if seq.came_s > came_before_s else ""

    def _offer(self, seq: EngineSequence) -> MigrationOffer | Declined:
        self._pool.hash(seq.chain, seq.tokens, seq.num_known_computed)
        passage, passages = None, self._pool.passages
        if passages is not None:
            passage = passages.leave(seq.backing, seq.chain, seq.shared_slot, seq.shared_tokens)
        if passage is None:
            return Declined(
                "not_movable", "others read its beginning, of which the balloon has no room for a copy"
            )
        migration_id = secrets.token_hex(16)
        self._leaving[migration_id] = _Leaving(seq, passage, [])
        longest = seq.longest(self._info.max_model_len)
        return MigrationOffer(migration_id, seq.request_id, self.shape, len(passage.rows), longest)

    def _sequence(self, state: SequenceState, seat: int) -> EngineSequence:
        now_s, request = self._clock(), state.request
        seq = EngineSequence(
            request,
            state.seed,
            now_s - state.age_s,
            TokenChain(request.cache_salt, self.shape.tokens_per_chunk),
            State.PARKED,
            list(state.output_token_ids),
            seat=seat,
            num_cached_tokens=state.num_cached_tokens,
            num_preemptions=state.num_preemptions,
            ttft_slo_s=state.ttft_slo_s,
            tpot_slo_s=state.tpot_slo_s,
            first_token_s=now_s - state.first_token_age_s,
            num_migrations=state.num_migrations,
            came_s=now_s,
        )
        seq.num_computed = seq.num_written = seq.num_tokens - 1
        self._pool.hash(seq.chain, seq.tokens, seq.num_computed)
        return seq

    def _is_here(self, seq: EngineSequence) -> bool:
        """Whether it has neither ended nor lost its KV."""
        return self._scheduler.get(seq.request_id) is seq and seq.state is State.PARKED

    def _open_id(self, request_id: str) -> bool:
        with self._door:
            if request_id in self._open_ids:
                return False
            self._open_ids.add(request_id)
        return True

    def _close_id(self, request_id: str) -> None:
        with self._door:
            self._open_ids.discard(request_id)


def shape_of(config: EngineConfig, info: EngineInfo, pool: MemoryPool) -> KvShape:
    """What an engine's KV looks like."""
    model, geometry = config.model, pool.kv.geometry
    is_dummy = model.load_format == "dummy"
    return KvShape(
        info.model_id,
        f"{model.source} (dummy {model.seed})" if is_dummy else model.source,
        info.dtype,
        info.vocab_size,
        config.tensor_parallel_size,
        geometry.num_layers,
        geometry.num_kv_heads,
        geometry.head_dim,
        geometry.layers_per_group,
        geometry.tokens_per_chunk,
        geometry.chunk_bytes,
        info.weight_bytes,
    )
