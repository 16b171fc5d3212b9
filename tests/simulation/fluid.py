"""Many groups and a day of traffic, coarsely: a group is a queue, a rate and two memories.

The policy is the real one.

    python -m tests.simulation.fluid --groups 256 --hours 24

A group holds open requests that are all alike. Those that fit its device decode; up to what the balloon has
room for are parked, and take turns; the others wait, and their first tokens are late. That is all of an
engine that `decide` needs to be shown, and a thousand times cheaper than that of `tests.simulation.world`.
Times to the first token and turns are not modelled: attainment here is that of admission alone.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.bench import report
from cluster.policy import PolicyConfig, State, decide, recovered
from cluster.reports import GroupReport
from engine.control import HostSnapshot, Order
from engine.messages import EngineSnapshot, MemorySnapshot

GIB = 1 << 30
_CHUNK = 2 << 20
_SLAB = 128  # chunks
_REQUEST = 256  # chunks of KV, 0.5 GiB
_POOL = 20 * 512
_PIN_CHUNKS_S = 750  # 1.5 GiB/s
_PERIOD_S = 86_400.0


@dataclass
class FluidGroup:
    """One group.

    Attributes:
        rate: requests it can finish a second while its device is full.
        base, swing: requests/s on average, and the share of that by which day and night differ.
        phase: of its day, 0 to 1: models are busy at different hours.
    """

    name: str
    model_id: str
    node: str
    rate: float
    base: float
    swing: float
    phase: float
    limit: int
    open: float = 0.0
    parked: float = 0.0
    physical: float = 0.0
    order: Order | None = None
    kept: float = 0.0
    missed: float = 0.0
    burst_until: float = 0.0

    def step(self, now: float, passed_s: float, dice: random.Random) -> None:
        """Let time pass: requests come, some finish, slabs are pinned or go back."""
        on_device = _POOL // _REQUEST
        level = 1 + self.swing * math.sin(2 * math.pi * (now / _PERIOD_S + self.phase))
        if now >= self.burst_until and dice.random() < passed_s / 1800:  # twice an hour
            self.burst_until = now + dice.uniform(30, 180)
        arrival = self.base * level * (3.0 if now < self.burst_until else 1.0)
        came = max(0.0, dice.gauss(arrival * passed_s, math.sqrt(arrival * passed_s)))
        wanted = min(self.limit, (self.parked + came) * _REQUEST)
        self.physical = max(
            self.parked * _REQUEST if self.physical > self.limit else 0.0,
            min(self.physical, self.limit),
            min(self.physical + _PIN_CHUNKS_S * passed_s, wanted),
        )
        room = on_device + min(self.physical, self.limit) / _REQUEST - self.open
        admitted = max(0.0, min(came, room))
        late = came - admitted
        self.kept += admitted
        self.missed += late
        self.open += came
        self.open -= min(self.open, self.rate * passed_s * min(1.0, self.open / on_device))
        self.parked = max(0.0, min(self.open - on_device, self.physical / _REQUEST))

    def report(self, now: float, host: HostSnapshot) -> GroupReport:
        """What the controller is told."""
        on_device = _POOL / _REQUEST
        running = min(self.open, on_device)
        waiting = max(0.0, self.open - running - self.parked)
        memory = MemorySnapshot(
            _CHUNK, _POOL, 0, int(running * _REQUEST), 0, 0, 0, 0, 0, 0, 0, 0,
            balloon=int(self.parked * _REQUEST), balloon_logical=self.limit,
            balloon_physical=int(self.physical), balloon_limit=self.limit, balloon_slab=_SLAB,
        )  # fmt: skip
        snapshot = EngineSnapshot(
            self.model_id, now, int(waiting), int(running), 0, 0, 0, 0, (), 0.0, memory,
            num_parked=int(self.parked), first_in_time=int(self.kept), first_late=int(self.missed),
            num_waiting_late=int(waiting), order=self.order, host=host,
        )  # fmt: skip
        return GroupReport(self.name, self.model_id, 1, 2.0, snapshot)


@dataclass
class Outcome:
    """What became of a day.

    Attributes:
        reversals: moves of a lever the other way within its dwell time.
        decide_s: CPU time of each call.
        most_share: of any node's memory that was promised or held at one time.
    """

    kept: float = 0.0
    missed: float = 0.0
    num_orders: int = 0
    reversals: int = 0
    most_share: float = 0.0
    decide_s: list[float] = field(default_factory=list)
    actions: Counter[str] = field(default_factory=Counter)

    @property
    def attainment(self) -> float:
        return self.kept / max(1e-9, self.kept + self.missed)


def make_groups(count: int, per_node: int, host_bytes: int, seed: int) -> list[FluidGroup]:
    """Groups of a quarter as many models; those on a node are busy at different hours."""
    dice = random.Random(seed)
    return [
        FluidGroup(
            f"g{at}",
            f"m{at % max(1, count // 4)}",
            f"n{at // per_node}",
            rate=2.0,
            base=dice.uniform(0.7, 1.3),
            swing=0.7,
            phase=(at % per_node) / per_node,
            limit=host_bytes // per_node // _CHUNK // _SLAB * _SLAB,
        )
        for at in range(count)
    ]


def simulate_day(
    count: int,
    seconds: float,
    config: PolicyConfig | None,
    tick_s: float = 1.0,
    per_node: int = 8,
    host_gib: int = 256,
    seed: int = 1,
    is_constant: bool = False,
) -> Outcome:
    """Traffic for so long, under the policy, or with host memory divided equally for good."""
    groups = make_groups(count, per_node, host_gib * GIB, seed)
    dice, outcome, state = random.Random(seed + 1), Outcome(), None
    if is_constant:
        for group in groups:
            group.swing = 0.0
            group.burst_until = math.inf
            group.base /= 3.0
    budget = host_gib * GIB
    config = config and replace(config, host_memory_bytes=budget)
    moved: dict[tuple[str, str], tuple[int, float]] = {}
    now = 0.0
    while now < seconds:
        now += tick_s
        for group in groups:
            group.step(now, tick_s, dice)
        if config is not None:
            state = _tick(groups, state, config, now, outcome, moved)
        _check_nodes(groups, budget, outcome)
    outcome.kept = sum(group.kept for group in groups)
    outcome.missed = sum(group.missed for group in groups)
    return outcome


def _tick(
    groups: Sequence[FluidGroup],
    state: State | None,
    config: PolicyConfig,
    now: float,
    outcome: Outcome,
    moved: dict[tuple[str, str], tuple[int, float]],
) -> State:
    hosts = {group.node: HostSnapshot(group.node, 1 << 40, 1 << 40) for group in groups}
    reports = [group.report(now, hosts[group.node]) for group in groups]
    state = state or recovered(reports, config, now)
    started = time.thread_time()
    decision, state = decide(reports, state, config, now)
    outcome.decide_s.append(time.thread_time() - started)
    by_name = {group.name: group for group in groups}
    for instruction in decision.instructions:
        group = by_name[instruction.group_id]
        outcome.num_orders += group.order is None or group.order != instruction.order
        group.order = instruction.order
        group.limit = instruction.order.balloon_logical_bytes // _CHUNK
    for action in decision.actions:
        outcome.actions[f"{action.action} {action.reason}"] += 1
        lever, _, way = action.action.rpartition("_")
        if way in ("up", "down") and lever:
            before = moved.get((action.subject, lever))
            direction = 1 if way == "up" else -1
            if before is not None and before[0] != direction and now - before[1] < config.dwell_s:
                outcome.reversals += 1
            moved[action.subject, lever] = direction, now
    return state


def _check_nodes(groups: Sequence[FluidGroup], budget: int, outcome: Outcome) -> None:
    promised: Counter[str] = Counter()
    for group in groups:
        promised[group.node] += int(max(group.limit, group.physical)) * _CHUNK
    outcome.most_share = max(outcome.most_share, max(promised.values()) / budget)


def main() -> None:
    """Simulate, with and without the controller, print the figures and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", type=int, default=256)
    parser.add_argument("--hours", type=float, default=24.0)
    parser.add_argument("--tick-s", type=float, default=5.0, help="of the simulation and the controller")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    for name, config in (("static", None), ("controlled", PolicyConfig())):
        day = simulate_day(args.groups, args.hours * 3600, config, args.tick_s)
        found[name] = {"attainment": round(day.attainment, 4), "orders": day.num_orders}
        if day.decide_s:
            found[name] |= {
                "decide_ms": [round(1e3 * figure, 2) for figure in _spread(day.decide_s)],
                "reversals_within_dwell": day.reversals,
                "most_of_a_node": round(day.most_share, 4),
                "actions": dict(day.actions),
            }
        print(f"{name:10} {found[name]}", flush=True)
    print(json.dumps({"bench": "fluid_day", "simulated": True, "figure": found, "commit": report.commit()}))


def _spread(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Median, 99th percentile and maximum."""
    ordered = sorted(seconds)
    return statistics.median(ordered), ordered[int(0.99 * (len(ordered) - 1))], ordered[-1]


if __name__ == "__main__":
    main()
