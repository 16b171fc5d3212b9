"""Random loads on engines that park, and random moves of sequences in a pool: all is right, nothing lost."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

import pytest
import torch

from engine.config import MemoryConfig, SchedulerConfig
from engine.memory import ahead
from engine.memory.kv_geometry import KvGeometry
from engine.messages import GenerateRequest, SamplingParams
from tests.failing_memory import FailingVirtualMemory
from tests.fakes import CHUNK_BYTES, Bench, HeldCopies, answer
from tests.unit.engine_cases import tokens
from tests.unit.parking_cases import LONGEST, Guest, T, Yard, filled, num_parkings, watch

MAX_STEPS = 20_000
LONGEST_PROMPT, LONGEST_ANSWER = 180, 50


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two that wait for each other beside a busy process take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Load:
    """Requests at random: prompts that begin alike, answers that stop early, promises of all kinds."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(f"{seed}/load")
        self._stems = [tokens(f"{seed}/stem{at}", 150) for at in range(self.dice.choice([1, 3]))]
        self._name = f"{seed}/own"
        self.answers: dict[str, tuple[int, ...]] = {}

    def next(self) -> GenerateRequest:
        """A request; `answers` has what it will be told."""
        dice, request_id = self.dice, f"q{len(self.answers)}"
        stem = dice.choice(self._stems)[: dice.randrange(150)] if dice.random() < 0.5 else ()
        prompt = (*stem, *tokens(self._name + request_id, dice.randint(1, 100)))[:LONGEST_PROMPT]
        whole = answer(prompt, dice.randint(1, LONGEST_ANSWER))
        stop = (dice.choice(whole),) if dice.random() < 0.3 else ()
        sampling = SamplingParams(max_tokens=len(whole), stop_token_ids=stop)
        self.answers[request_id] = whole[: whole.index(stop[0]) + 1] if stop else whole
        return GenerateRequest(
            request_id,
            prompt,
            sampling,
            ttft_slo_s=dice.choice([0.01, 1.0]),
            tpot_slo_s=dice.choice([0.003, 0.01, 0.03, 0.1]),
            priority=dice.choice([0, 0, 1]),
        )


def tight_bench(seed: int) -> Bench:
    """An engine of random limits, with a link that is slow, or a real one."""
    dice = random.Random(f"{seed}/bench")
    memory = MemoryConfig(enable_prefix_caching=dice.random() < 0.7, map_ahead_tokens=dice.choice([0, 32]))
    limits = SchedulerConfig(
        max_num_seqs=dice.choice([4, 8, 16]),
        max_num_batched_tokens=dice.choice([24, 64]),
        turn_tokens=dice.choice([1, 4, 16]),
        deposit=dice.random() < 0.7,
        policy=dice.choice(["slo", "slo", "slo", "fcfs"]),
    )
    bench = Bench(
        dice.choice([48, 54, 66]),
        memory,
        limits,
        geometry=KvGeometry.choose(4, 2, 8, 4, CHUNK_BYTES, layers_per_group=dice.choice([1, 1, 2])),
        steps_ahead=seed % 2,
        balloon_chunks=dice.choice([24, 60, 400]),
        copies=HeldCopies() if dice.random() < 0.7 else None,
    )
    filled(bench.balloon)
    return bench


def serve_at_random(bench: Bench, load: Load) -> set[str]:
    """A random load with cancellations and trims, to the end; who was cancelled."""
    dice, waiting, cancelled = load.dice, load.dice.randint(15, 40), set()
    parking = bench.pool.parking
    assert parking is not None
    copies = parking.copies if isinstance(parking.copies, HeldCopies) else HeldCopies()
    watch(bench.pool, copies)
    arrival, speed = dice.choice([0.2, 0.4, 1.0]), dice.choice([0.05, 0.3, 0.8])
    for _ in range(MAX_STEPS):
        while waiting and dice.random() < arrival:
            bench.engine.submit(load.next())
            waiting -= 1
        if load.answers and dice.random() < 0.01:
            cancelled.add(dice.choice(sorted(load.answers)))
            bench.engine.cancel(max(cancelled))
        if dice.random() < 0.01:
            bench.engine.trim(drop_cache=dice.random() < 0.5)
        if copies.under_way and dice.random() < speed:
            copies.end(dice.choice(copies.under_way))
        is_busy = bench.engine.step()
        if dice.random() < 0.2:
            bench.pool.check()
        if not is_busy and not waiting:
            return cancelled
    raise AssertionError("the engine does not come to an end")


def serve_and_check(seed: int) -> int:
    """One load on one engine; how often a sequence was parked."""
    bench, load = tight_bench(seed), Load(seed)
    cancelled = serve_at_random(bench, load)
    bench.assert_idle()
    assert bench.num_held == 0
    for request_id, whole in load.answers.items():
        delta = bench.deltas[request_id]
        assert delta.error is None
        if request_id in cancelled and delta.finish_reason == "cancelled":
            assert delta.token_ids == whole[: len(delta.token_ids)]
        else:
            assert delta.token_ids == whole
    return num_parkings(bench)


@pytest.mark.parametrize("group", range(5))
def test_random_loads_in_tight_memory(group: int) -> None:
    parkings = {}
    for seed in range(8 * group, 8 * group + 8):
        parkings[seed] = serve_and_check(seed)
    assert sum(parkings.values()) > 20, "these loads were hard to fit"


class Moves:
    """Guests of a yard, moved at random; some run, some are parked, some on their way."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        total, host = self.dice.choice([(44, 60), (70, 32), (120, 200)])
        self.vm = FailingVirtualMemory(CHUNK_BYTES, total)
        self.yard = Yard(total, host, num_slots=self.dice.choice([4, 10]), vm=self.vm)
        self.yard.copies.fails = lambda ticket: self.dice.random() < self.fail_share
        self.fail_share = self.dice.choice([0.0, 0.0, 0.1])
        self.running: list[Guest] = []
        self.parked: list[Guest] = []
        self.coming: list[Guest] = []
        self.seen = {"left": 0, "back": 0, "lost": 0, "failed": 0, "full": 0}

    def run(self, operations: int) -> None:
        weights: dict[Callable[[], None], float] = {
            self.start: 10,
            self.compute: 12,
            self.park: 12,
            self.bring_back: 12,
            self.end_copies: 10,
            self.save: 10,
            self.finish: 12,
            self.end: 2,
            self.refuse: 0.5,
            self.trim: 0.5,
        }
        for _ in range(operations):
            self.dice.choices([*weights], [*weights.values()])[0]()
            self.settle()
            self.yard.pool.check()
            for ticket in self.yard.copies.under_way:
                self.yard.copies.check(ticket)
            for guest in self.running:
                self.yard.verify(guest)
        self.wind_up()

    def start(self) -> None:
        known = self.dice.choice([one.known for one in self.everybody] or [()])
        prefix = known[: self.dice.randrange(LONGEST - T)] if self.dice.random() < 0.4 else ()
        num_tokens = self.dice.randint(len(prefix) + 1, min(len(prefix) + 3 * T, LONGEST - T + 1))
        if self.yard.pool.num_free_slots and self.yard.geometry.chunks_for(num_tokens) < self.room:
            guest = self.yard.try_guest(num_tokens, prefix)
            if guest is not None:
                self.running.append(guest)

    def compute(self) -> None:
        """Sometimes the step stays in flight."""
        if self.running:
            guest = self.dice.choice(self.running)
            self.yard.launch(guest, min(LONGEST, guest.num_computed + self.dice.randint(1, T)))

    def finish(self) -> None:
        self.yard.finish()

    def park(self) -> None:
        if not self.running:
            return
        guest = self.dice.choice(self.running)
        if self.yard.park(guest, self.dice.choice([0, 1, self.dice.randint(0, 40), 1000])):
            self.running.remove(guest)
            self.parked.append(guest)
        else:
            self.seen["full"] += 1

    def bring_back(self) -> None:
        if self.parked:
            guest = self.dice.choice(self.parked)
            step_s = self.dice.choice([0.0, math.inf])
            if self.yard.parking.bring_back(guest.backing, self.dice.choice([0, 8]), step_s=step_s):
                self.parked.remove(guest)
                self.coming.append(guest)

    def end_copies(self) -> None:
        if self.yard.copies.under_way:
            self.yard.copies.end(self.dice.choice(self.yard.copies.under_way))

    def save(self) -> None:
        if self.running and not self.yard.parking.is_copying:
            guest = self.dice.choice(self.running)
            self.yard.parking.save(guest.backing, guest.held_slot, guest.num_computed, 4 * 4 * CHUNK_BYTES)

    def end(self) -> None:
        if self.everybody:
            guest = self.dice.choice(self.everybody)
            for group in (self.running, self.parked, self.coming):
                if guest in group:
                    group.remove(guest)
            self.yard.end(guest)

    def refuse(self) -> None:
        self.vm.refuse(self.dice.choice(["map", "access", "unmap"]), after=self.dice.randrange(4))

    def trim(self) -> None:
        self.yard.pool.trim(drops_cache=self.dice.random() < 0.5)

    @property
    def everybody(self) -> list[Guest]:
        return [*self.running, *self.parked, *self.coming]

    @property
    def room(self) -> int:
        return self.yard.pool.room_for_kv(T // 2, 1)

    def settle(self) -> None:
        """What the engine's loop does between two steps: take in who has arrived."""
        parking = self.yard.parking
        parking.settle()
        for guest in [one for one in self.parked if one.backing.has_failed]:
            self.seen["failed"] += 1
            self.parked.remove(guest)
            guest.slot = parking.returned(guest.backing, guest.chain, guest.num_computed)
            self.running.append(guest)
        for guest in [one for one in self.coming if parking.is_back(one.backing)]:
            self.coming.remove(guest)
            if guest.backing.is_lost:
                self.seen["lost"] += 1
                self.yard.end(guest)
                continue
            self.seen["back"] += 1
            guest.slot = parking.returned(guest.backing, guest.chain, guest.num_computed)
            self.running.append(guest)
        self.seen["left"] += sum(bool(one.backing.absent) for one in self.parked)

    def wind_up(self) -> None:
        """Everybody goes, parked or not, and nothing is left."""
        self.vm.allow()
        for guest in self.everybody:
            self.yard.end(guest)
        self.yard.finish()
        self.yard.pool.trim(drops_cache=True)
        self.yard.pool.check()
        memory = self.yard.pool.snapshot()
        assert memory.kv == memory.cached == memory.retiring == memory.balloon == 0


@pytest.mark.parametrize("seed", range(20))
def test_random_moves_of_sequences(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_LEAST_AT_ONCE", 2)  # of so small sequences; else none is mapped beside steps
    monkeypatch.setattr(ahead, "_MAX_SENT", 8)
    moves = Moves(seed)
    moves.run(250)
    assert moves.seen["left"]
    assert moves.seen["back"]
