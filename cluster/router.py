"""The Ray Serve router: collects facts of groups and requests, and lets `cluster.ranking` decide.

Facts are queue lengths that Serve keeps, what each group pushes every half second (`ranking.routing_stats`),
and what this router has sent where (`cluster.prefix_record`).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

from cluster import early_choice
from cluster.prefix_record import PrefixRecord, chain_of, home_of, key_of
from cluster.ranking import Ask, GroupLoad, door_of, load_of, rank_groups
from cluster.request_courier import Handover
from engine.messages import GenerateRequest
from engine.migration import Migrated

_LAG_S = 0.2  # facts are so old when they come, at least: what was sent before may not be in them
CHOSEN_S = 1.0  # sending follows a choice within milliseconds; after this it was not sent at all


class InFlight:
    """One router's own count per group: requests chosen for it, or sent and not finished.

    Serve's count starts when a request is sent, after every request of a burst has been chosen for,
    and is overwritten by what the group saw when an older request arrived: of six requests at once
    one group got five.
    """

    def __init__(self) -> None:
        self._num_sent: Counter[ReplicaID] = Counter()
        self._chosen: dict[asyncio.Future[RunningReplica], tuple[ReplicaID, float]] = {}

    def choose(self, request: asyncio.Future[RunningReplica], group: ReplicaID, now_s: float) -> None:
        """`group` came first for a request; Serve sets its future to the group that it gets."""
        self._chosen[request] = (group, now_s)

    def send(self, group: ReplicaID) -> None:
        """A request went to the group."""
        self._num_sent[group] += 1
        for request in self._chosen:
            if request.done() and self._target(request) == group:
                del self._chosen[request]
                return

    def complete(self, group: ReplicaID) -> None:
        """A sent request ended, in whatever way."""
        self._num_sent[group] = max(0, self._num_sent[group] - 1)

    def keep_only(self, groups: Iterable[ReplicaID]) -> None:
        """Forgets all other groups."""
        self._num_sent = Counter({group: self._num_sent[group] for group in groups})

    def counts(self, now_s: float) -> Counter[ReplicaID]:
        """Requests of this router at each group; forgets choices that were not sent."""
        self._chosen = {
            request: (group, chosen_s)
            for request, (group, chosen_s) in self._chosen.items()
            if now_s - chosen_s <= CHOSEN_S and not request.cancelled()
        }
        return self._num_sent + Counter(map(self._target, self._chosen))

    def _target(self, request: asyncio.Future[RunningReplica]) -> ReplicaID | None:
        """Where Serve has sent it, or will."""
        if not request.done():
            return self._chosen[request][0]
        return None if request.cancelled() else request.result().replica_id


class SentTokens:
    """Prompt tokens that this router has sent to each group lately, and that have to be computed there."""

    def __init__(self) -> None:
        self._sent: dict[Hashable, deque[tuple[float, int]]] = {}

    def send(self, group: Hashable, num_tokens: int, now_s: float) -> None:
        """A request was chosen for a group."""
        self._sent.setdefault(group, deque()).append((now_s, num_tokens))

    def complete(self, group: Hashable) -> None:
        """A request has ended there: most likely the one that was sent first."""
        if sent := self._sent.get(group):
            sent.popleft()

    def since(self, group: Hashable, told_s: float) -> int:
        """Those that facts which came at that time do not tell of. Forgets the others."""
        sent = self._sent.get(group, deque())
        while sent and sent[0][0] <= told_s - _LAG_S:
            sent.popleft()
        return sum(num_tokens for _, num_tokens in sent)

    def keep_only(self, groups: Iterable[Hashable]) -> None:
        """Forgets all other groups."""
        self._sent = {group: self._sent[group] for group in groups if group in self._sent}


class _Choice(NamedTuple):
    """Groups in the order of a ranking, and what it was made from.

    Attributes:
        ranked: indices, the best first.
        names, loads: of all groups.
    """

    ranked: list[int]
    names: list[ReplicaID]
    loads: list[GroupLoad]
    chain: list[bytes]
    ask: Ask


class SloRouter(FIFOMixin, RequestRouter):
    """Ray Serve's plug for `rank_groups`. Each request gets the group that was chosen for it."""

    def initialize_state(
        self, clock: Callable[[], float] = time.monotonic, seed: int | None = None, **kwargs: object
    ) -> None:
        """Called by Serve once; `clock` gives seconds."""
        self._clock = clock
        self._rng = random.Random(seed)
        self._in_flight = InFlight()
        self._record: PrefixRecord[ReplicaID] = PrefixRecord()
        self._sent_tokens = SentTokens()
        self._changed_s: dict[ReplicaID, float] = {}
        self._last_stats: dict[ReplicaID, object] = {}
        self._loop: asyncio.AbstractEventLoop | None = None  # Serve's, for this router
        early_choice.register(self._deployment_id.app_name, self._deployment_id.name, self)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Notes when each group's facts changed, on this process' clock: clocks of nodes differ."""
        super().update_replicas(replicas)
        now = self._clock()
        self._in_flight.keep_only(replica.replica_id for replica in replicas)
        self._record.keep_only(replica.replica_id for replica in replicas)
        self._sent_tokens.keep_only(replica.replica_id for replica in replicas)
        self._changed_s = {
            replica.replica_id: now
            if self._last_stats.get(replica.replica_id) != replica.routing_stats
            else self._changed_s.get(replica.replica_id, now)
            for replica in replicas
        }
        self._last_stats = {replica.replica_id: dict(replica.routing_stats) for replica in replicas}
        for replica in replicas:
            self._record.limit(replica.replica_id, replica.routing_stats.get("capacity_tokens", 0.0))

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """All candidates, one per rank, best first; Serve takes the first that has room."""
        if pending_request is not None:
            # Else Serve asks again without a pause while every group is full.
            pending_request.routing_context.should_backoff = True
            if early := _take_early(pending_request, candidate_replicas):
                self._in_flight.choose(pending_request.future, early.replica_id, self._clock())
                return [[early]]
            _recall_refused(pending_request)
        now, self._loop = self._clock(), asyncio.get_running_loop()
        home = _home_of(pending_request, candidate_replicas)
        if home is not None and pending_request is not None:
            self._in_flight.choose(pending_request.future, home.replica_id, now)
            return [[home]]
        choice = self._rank(_request_of(pending_request), candidate_replicas, now)
        if choice.ranked and pending_request is not None:
            self._chosen(choice, pending_request.future, now)
        return [[candidate_replicas[index]] for index in choice.ranked]

    def begin_early(self, request: GenerateRequest, handover: Handover) -> bool:
        """See `cluster.early_choice`."""
        if self._loop is not asyncio.get_running_loop():
            return False  # it is another one's, or has never been asked for a group
        candidates, now = list(self.curr_replicas.values()), self._clock()
        choice = self._rank(request, candidates, now)
        if not choice.ranked:
            return False
        best = candidates[choice.ranked[0]]
        door = door_of(best.routing_stats)
        if door is None or choice.loads[choice.ranked[0]].queue_len >= best.max_ongoing_requests:
            return False
        handover.send_to(door)
        if not handover.is_under_way:
            return False
        early: asyncio.Future[RunningReplica] = self._loop.create_future()
        self._chosen(choice, early, now)
        handover.chosen_early(best.replica_id, early)
        return True

    def _rank(
        self, request: GenerateRequest | None, candidates: Sequence[RunningReplica], now: float
    ) -> _Choice:
        counts = self._in_flight.counts(now)
        loads = [self._load(replica, counts[replica.replica_id], now) for replica in candidates]
        names = [replica.replica_id for replica in candidates]
        chain = chain_of(request.prompt_token_ids, request.cache_salt) if request is not None else []
        ask = self._ask(request, chain, names)
        return _Choice(rank_groups(loads, ask, self._rng), names, loads, chain, ask)

    def _chosen(self, choice: _Choice, request: asyncio.Future[RunningReplica], now: float) -> None:
        """Count a request at the group that came first."""
        first = choice.ranked[0]
        best, ask = choice.names[first], choice.ask
        self._in_flight.choose(request, best, now)
        self._record.sent(best, choice.chain)
        self._sent_tokens.send(best, ask.prompt_tokens - ask.cached_tokens[first], now)

    def _get_pending_request_matching_metadata(
        self, request_metadata: object = None
    ) -> PendingRequest | None:
        """Asked by the mixin whose choice this is; else it would give it to the oldest request.

        Serve's own answer goes by an id that all calls of one HTTP request share: of two choices (`n`) one
        would wait for ever. The metadata are the very object of the request that was chosen for.
        """
        for pending in self._pending_requests_to_fulfill:
            if pending.metadata is request_metadata and not pending.future.done():
                return pending
        return None

    def _fulfill_next_pending_request(self, replica: RunningReplica, request_metadata: object = None) -> None:
        """Here a request's group is known, and its engine may begin, before Serve's call is sent."""
        pending = self._get_pending_request_matching_metadata(request_metadata)
        handover = _handover_of(pending) if pending is not None else None
        if handover is not None and (door := door_of(replica.routing_stats)) is not None:
            handover.send_to(door)
        super()._fulfill_next_pending_request(replica, request_metadata)

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """The call is sent when this returns. `InFlight` counts the request from the choice on."""
        replica = await super()._choose_replica_for_request(pending_request, is_retry=is_retry)
        if (handover := _handover_of(pending_request)) is not None:
            await handover.pause()
        return replica

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Called by Serve for each request that it sends."""
        super().on_send_request(replica_id)
        self._in_flight.send(replica_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Serve once for each request that it sent, refused and failed ones included."""
        super().on_request_completed(replica_id, internal_request_id)
        self._in_flight.complete(replica_id)
        self._sent_tokens.complete(replica_id)

    def _ask(self, request: GenerateRequest | None, chain: list[bytes], names: Sequence[ReplicaID]) -> Ask:
        """What the ranking needs to know of a request.

        One that names its session, and of whose prompt nothing is known, is taken to be cached at its home:
        another ingress replica has sent it there, or it begins there.
        """
        if request is None:
            return Ask(0, [0] * len(names))
        num_tokens = len(request.prompt_token_ids)
        cached = [min(num_tokens, self._record.cached_tokens(name, chain)) for name in names]
        ids = [name.unique_id for name in names]
        session = request.session_id
        home = home_of(key_of(session) if session else chain[0] if chain else b"", ids)
        if session and home is not None and not any(cached):
            cached[home] = num_tokens
        is_known = bool(session or chain)
        return Ask(num_tokens, cached, request.ttft_slo_s, home if is_known else None)

    def _load(self, replica: RunningReplica, num_in_flight: int, now_s: float) -> GroupLoad:
        changed_s = self._changed_s.get(replica.replica_id)
        return load_of(
            replica.routing_stats,
            max(self.replica_queue_len_cache.get(replica.replica_id) or 0, num_in_flight),
            self._sent_tokens.since(replica.replica_id, changed_s or 0.0),
            float("inf") if changed_s is None else now_s - changed_s,
        )


def _take_early(pending: PendingRequest, candidates: Sequence[RunningReplica]) -> RunningReplica | None:
    """The group that has the request already; None if there is none, or if it is gone."""
    handover = _handover_of(pending)
    group = None if handover is None else handover.take_early()
    return next((one for one in candidates if one.replica_id == group), None)


def _recall_refused(pending: PendingRequest) -> None:
    """Serve asks again for a request that its group has refused: with a new future."""
    if (handover := _handover_of(pending)) is not None and not pending.future.done():
        handover.recall()


def _handover_of(pending: PendingRequest) -> Handover | None:
    second = pending.args[1] if len(pending.args) > 1 else None
    return second if isinstance(second, Handover) else None


def _home_of(pending: PendingRequest | None, candidates: Sequence[RunningReplica]) -> RunningReplica | None:
    """The group that a request has moved to; it alone knows it."""
    moved = pending.args[0] if pending is not None and pending.args else None
    if not isinstance(moved, Migrated):
        return None
    return next((one for one in candidates if one.replica_id.unique_id == moved.group_id), None)


def _request_of(pending: PendingRequest | None) -> GenerateRequest | None:
    """The engine request that a call carries; control calls carry none."""
    first = pending.args[0] if pending is not None and pending.args else None
    return first if isinstance(first, GenerateRequest) else None
