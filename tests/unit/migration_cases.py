"""Two engines between which parked requests move, by hand or by their migrators."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from engine.config import MemoryConfig, SchedulerConfig
from engine.core import Engine
from engine.memory.kv_stream import KvStreams, KvTransport
from engine.memory.pool import MemoryPool
from engine.messages import GenerateRequest, TokenDelta
from engine.migration import Accepted, MigrationOffer
from tests.fakes import CHUNK_BYTES, Bench, Collected
from tests.unit.engine_cases import ask
from tests.unit.parking_cases import filled

PATIENCE_S = 60.0
# At the pace of the fake clock each is soon a turn ahead of its client.
REQUESTS = [replace(ask(f"r{at}", 20 + 7 * at, 50), tpot_slo_s=0.01) for at in range(4)]


class Mover(Protocol):
    """What has an engine between which requests are moved: `tests.fakes.Bench`, or a `Side`."""

    @property
    def engine(self) -> Engine: ...

    @property
    def pool(self) -> MemoryPool: ...

    @property
    def deltas(self) -> Mapping[str, TokenDelta]: ...


@dataclass
class Side:
    """An engine with a real model, and what it said."""

    engine: Engine
    deltas: Collected

    @property
    def pool(self) -> MemoryPool:
        return self.engine._pool

    def run(self) -> None:
        """To the end of its requests."""
        while self.engine.step():
            pass
        self.pool.check()


def eventually(holds: Callable[[], bool]) -> None:
    """Wait until that is so."""
    give_up = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < give_up
        time.sleep(0.001)


def crowded(
    total: int = 30, balloon_chunks: int = 400, transport: KvTransport | None = None, max_num_seqs: int = 4
) -> Bench:
    """An engine with too little memory for its requests, which take turns."""
    limits = SchedulerConfig(
        max_num_seqs=max_num_seqs, max_num_batched_tokens=64, turn_tokens=4, min_retained_chunks=0
    )
    transport = transport or KvStreams("127.0.0.1", CHUNK_BYTES, stall_s=5.0)
    bench = Bench(
        total, MemoryConfig(map_ahead_tokens=0), limits, balloon_chunks=balloon_chunks, transport=transport
    )
    filled(bench.balloon)
    return bench


def offer_of(bench: Mover, name: str | None = None) -> MigrationOffer:
    """Step until a request, or that one, can move."""
    for _ in range(2000):
        offer = bench.engine.migrations.leave(name, 0.0)
        if isinstance(offer, MigrationOffer):
            return offer
        assert bench.engine.step(), "nobody was ever parked"
    raise AssertionError("nobody was ever parked")


def send(source: Mover, target: Mover, offer: MigrationOffer) -> None:
    """Everything up to the moment at which the source may let go."""
    number = offer.migration_id
    eventually(lambda: source.engine.migrations.is_saved(number))
    answer = target.engine.migrations.prepare(offer)
    assert isinstance(answer, Accepted), answer
    source.engine.migrations.send(number, answer.doors)
    eventually(lambda: source.engine.migrations.is_through(number))
    eventually(lambda: target.engine.migrations.is_through(number))


def move(source: Mover, target: Mover, name: str | None = None) -> str:
    """The whole way of one request; its name."""
    offer = offer_of(source, name)
    send(source, target, offer)
    state = source.engine.migrations.pack(offer.migration_id)
    assert state is not None
    target.engine.migrations.take_in(offer.migration_id, state)
    assert source.engine.migrations.let_go(offer.migration_id)
    assert target.engine.migrations.adopt(offer.migration_id)
    check(source, target)
    return offer.request_id


def check(*benches: Mover) -> None:
    """Every chunk, of the device and of the host, is accounted for."""
    for bench in benches:
        bench.pool.check()


def said(request: GenerateRequest, *benches: Mover) -> tuple[int, ...]:
    """All tokens of a request, the source's first."""
    parts = [bench.deltas[request.request_id] for bench in benches if request.request_id in bench.deltas]
    return tuple(token for part in parts for token in part.token_ids)
