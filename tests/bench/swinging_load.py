"""Two groups that share a node's host memory, and a load that swings from one to the other.

    python -m tests.bench.swinging_load              # Llama-3.1-8B on two A10Gs, in virtual time
    python -m tests.bench.swinging_load --real       # two engines on this machine's CPU, minutes

Each load is run twice: with host memory divided equally for good, and with the controller's real `decide`
called every second, its orders applied by the engines. What counts is the share of all requests of both
groups that got their first token and their pace as promised. The last line is JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from cluster.bench import report
from cluster.bench.summary import Record, summarise
from cluster.bench.workload import PlannedRequest, Workload
from cluster.policy import Decision, PolicyConfig, State, decide, recovered
from cluster.reports import GroupReport
from engine.calibration import StepRates
from engine.config import MIB, EngineConfig, MemoryConfig, ModelSource, SchedulerConfig, SloConfig
from engine.control import HostSnapshot, Order
from engine.messages import EngineSnapshot
from tests.bench.in_process import BallonetStepper, EngineStepper, Load
from tests.bench.step_watch import StepWatch
from tests.simulation.world import GIB, H100_8B, SimulatedEngine

TICK_S = 1.0


@dataclass(frozen=True, slots=True)
class Swing:
    """A load of two groups, in turns of `period_s`.

    Attributes:
        busy_s: of each period, in which one group has `busy` requests a second; the other always has `calm`.
        prompt_tokens, output_tokens: of each request.
        host_bytes: of the node, for both balloons.
        pool_bytes: of each device.
    """

    periods: int
    period_s: float
    busy_s: float
    busy: float
    calm: float
    prompt_tokens: int
    output_tokens: int
    host_bytes: int
    pool_bytes: int
    ttft_slo_s: float
    tpot_slo_s: float
    vocab_size: int = 32_000

    def workload(self, group: int, is_balanced: bool = False) -> Workload:
        """What one group is asked for. Balanced: half of the busy one's requests each, all the time."""
        requests: list[PlannedRequest] = []
        for period in range(self.periods):
            begin_s, is_busy = period * self.period_s, period % 2 == group
            if is_balanced:
                requests += self._requests(group, begin_s, self.period_s, self._mean)
            elif is_busy:
                requests += self._requests(group, begin_s, self.busy_s, self.busy)
            else:
                requests += self._requests(group, begin_s, self.period_s, self.calm)
        return Workload("swing", tuple(requests), group, self.vocab_size, None)

    @property
    def _mean(self) -> float:
        return (self.busy * self.busy_s / self.period_s + self.calm) / 2

    def _requests(self, group: int, begin_s: float, lasts_s: float, rate: float) -> list[PlannedRequest]:
        """About as many as that, at random times."""
        dice = random.Random(f"{group}/{begin_s}")
        at_s, found = begin_s + dice.expovariate(rate), []
        while at_s < begin_s + lasts_s:
            part = (f"{group}/{at_s}", self.prompt_tokens)
            found.append(PlannedRequest(at_s, self.prompt_tokens, self.output_tokens, (part,)))
            at_s += dice.expovariate(rate)
        return found


class Party:
    """One group: an engine, its load, and its own clock."""

    def __init__(
        self,
        name: str,
        engine: EngineStepper,
        workload: Workload,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        self.name = name
        self.engine = engine
        self.clock = clock
        self._sleep = sleep
        self._load = Load(workload, math.inf)
        self._origin = clock()
        self._watch = StepWatch(self._origin, engine.snapshot, engine.steps_ahead)

    @property
    def now_s(self) -> float:
        """Since the start."""
        return self.clock() - self._origin

    @property
    def has_ended(self) -> bool:
        return not self._load.due and not self._load.num_open

    def step(self, until_s: float) -> None:
        """A step, or a pause until the next request or `until_s`."""
        for name, prompt, output_tokens in self._load.take(self.now_s):
            self.engine.submit(name, prompt, output_tokens)
        self.engine.step()
        for gain in self.engine.gains():
            self._load.note(gain, self._origin)
        if not self._load.num_open:
            due_s = self._load.due[0][0] if self._load.due else math.inf
            self._sleep(max(0.0, min(due_s, until_s) - self.now_s))

    @property
    def snapshot(self) -> EngineSnapshot:
        """Of the engine."""
        return self.engine.engine.snapshot

    def apply(self, order: Order) -> object:
        """Have the engine follow an order."""
        return self.engine.engine.apply(order)

    def records(self) -> list[Record]:
        """What became of each request."""
        return self._load.driven(self.now_s, self._watch).records


class Governed(Protocol):
    """What orders are for."""

    name: str

    @property
    def snapshot(self) -> EngineSnapshot:
        """Of its engine."""

    def apply(self, order: Order) -> object:
        """Have an order followed."""


class Steering:
    """The controller's policy over engines; off if it has no policy.

    Args:
        state: that it begins with; None is recovered from what the engines say.
    """

    def __init__(
        self,
        parties: Sequence[Governed],
        host_bytes: int,
        slo_s: float,
        config: PolicyConfig | None,
        state: State | None = None,
    ) -> None:
        self._parties = parties
        self._host_bytes = host_bytes
        self._slo_s = slo_s
        self._config = config and replace(config, host_memory_bytes=host_bytes)
        self._state = state
        self.history: list[tuple[float, tuple[int, ...], tuple[int, ...]]] = []
        self.decisions: list[Decision] = []

    def tick(self, now_s: float) -> None:
        """Look, decide, and have orders left in the engines' inboxes."""
        memories = [party.snapshot.memory for party in self._parties]
        limits = tuple(memory.balloon_limit * memory.chunk_bytes for memory in memories)
        held = tuple(memory.balloon_physical * memory.chunk_bytes for memory in memories)
        self.history.append((now_s, limits, held))
        if self._config is None:
            return
        host = HostSnapshot("node", self._host_bytes, self._host_bytes)
        reports = [
            GroupReport(party.name, party.name, 1, self._slo_s, replace(party.snapshot, host=host))
            for party in self._parties
        ]
        state = self._state or recovered(reports, self._config, now_s)
        decision, self._state = decide(reports, state, self._config, now_s)
        self.decisions.append(decision)
        for instruction in decision.instructions:
            party = next(one for one in self._parties if one.name == instruction.group_id)
            party.apply(instruction.order)


def drive_together(
    parties: Sequence[Party], steering: Steering, choose: Callable[[Sequence[Party]], Party]
) -> None:
    """Run all loads to their ends, a tick every `TICK_S`.

    Args:
        choose: who steps next, of those that have not come to the next tick.
    """
    tick_s = 0.0
    while not all(party.has_ended for party in parties):
        behind = [party for party in parties if party.now_s < tick_s]
        if behind:
            choose(behind).step(tick_s)
        else:
            steering.tick(tick_s)
            tick_s += TICK_S


def furthest_behind(parties: Sequence[Party]) -> Party:
    """For clocks of their own."""
    return min(parties, key=lambda party: party.now_s)


class InTurn:
    """For one clock."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, parties: Sequence[Party]) -> Party:
        self._count += 1
        return parties[self._count % len(parties)]


# Llama-3.1-8B in bf16 on an A10G of 24 GB: 16 GB of weights at 600 GB/s beside 1.3 ms of launches, 70 TFLOP/s
# in matrix products and 60 in attention, 12 GiB/s to the host (data sheet, less a third). Few of its steps
# make a second, so that three minutes are simulated in ten seconds.
A10G_8B = replace(
    H100_8B,
    steps=StepRates(28e-3, 16.1e9 / 70e12, 131072 / 0.55e12, 524288 / 60e12),
    link_bytes_s=12 * GIB,
)
# A burst of 110 requests needs 13 GiB of KV, of which the device has 1.5. It is served in three minutes.
SIMULATED = Swing(2, 180.0, 20.0, 5.5, 0.02, 600, 512, 8 * GIB, 3 * GIB // 2, 3.0, 0.4)


def simulated_parties(swing: Swing, is_balanced: bool) -> list[Party]:
    """Two engines in virtual time, with half of the host memory each, which is there from the start."""
    slo = SloConfig(swing.ttft_slo_s * 1e3, swing.tpot_slo_s * 1e3)
    limits = SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=2048)
    parties = []
    for group in range(2):
        engine = SimulatedEngine(
            swing.pool_bytes / GIB, swing.host_bytes / GIB / 2, limits, slo, device=A10G_8B, slab_gib=0.25
        )
        while engine.snapshot.memory.balloon_physical < engine.snapshot.memory.balloon_limit:
            engine.step()
            engine.clock.advance(0.1)
        load = swing.workload(group, is_balanced)
        parties.append(Party(f"group{group}", engine, load, engine.clock, engine.clock.advance))
    return parties


# Two small layers with random weights and wide KV, 8 KiB a token: a burst of 30 requests needs 90 MiB, of
# which the pool has 28.
TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}
REAL = Swing(2, 25.0, 5.0, 6.0, 0.1, 300, 96, 80 * MIB, 28 * MIB, 2.0, 0.25, vocab_size=1024)


def real_parties(swing: Swing, is_balanced: bool, folder: Path) -> list[Party]:
    """Two engines in this process, with half of the host memory each, on one clock."""
    (folder / "config.json").write_text(json.dumps(TINY_LLAMA))
    engines = []
    for group in range(2):
        config = EngineConfig(
            ModelSource(f"group{group}", str(folder), load_format="dummy"),
            MemoryConfig(
                pool_bytes=swing.pool_bytes, balloon_bytes=swing.host_bytes // 2, balloon_slab_bytes=4 * MIB
            ),
            SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=512),
            SloConfig(swing.ttft_slo_s * 1e3, swing.tpot_slo_s * 1e3),
            num_threads=1,
        )
        engines.append(BallonetStepper(config))
    loads = [swing.workload(group, is_balanced) for group in range(2)]
    return [
        Party(f"group{group}", engine, load, time.perf_counter, _nap)
        for group, (engine, load) in enumerate(zip(engines, loads, strict=True))
    ]


def run(
    parties: list[Party],
    swing: Swing,
    config: PolicyConfig | None,
    choose: Callable[[Sequence[Party]], Party],
) -> dict[str, Any]:
    """One run; its figures."""
    steering = Steering(parties, swing.host_bytes, swing.ttft_slo_s, config)
    drive_together(parties, steering, choose)
    records = [record for party in parties for record in party.records()]
    duration_s = max(party.now_s for party in parties)
    objectives = {"ttft": swing.ttft_slo_s * 1e3, "tpot": swing.tpot_slo_s * 1e3}
    summary = report.figures(summarise(records, duration_s, objectives, (50.0, 99.0)))
    most = max(sum(map(max, limits, held)) for _, limits, held in steering.history)
    return {
        "attainment": summary["slo_attainment"]["all"],
        "requests": len(records),
        "duration_s": round(duration_s, 1),
        "p50_ttft_ms": round(summary["p50_ttft_ms"], 1),
        "p99_ttft_ms": round(summary["p99_ttft_ms"], 1),
        "orders": sum(len(one.instructions) for one in steering.decisions),
        "moves": sum(
            action.action.startswith("balloon") for one in steering.decisions for action in one.actions
        ),
        "most_host_gib": round(most / GIB, 3),
    }


def _nap(seconds: float) -> None:
    """A moment: the other engine may have work, on the same thread."""
    time.sleep(min(seconds, 0.005))


def figures(
    swing: Swing, make: Callable[[bool], list[Party]], choose: Callable[[Sequence[Party]], Party], says: bool
) -> dict[str, Any]:
    """Both loads, each with and without the controller."""
    found: dict[str, Any] = {}
    for load, is_balanced in (("swinging", False), ("balanced", True)):
        for name, config in (("static", None), ("controlled", PolicyConfig())):
            found[f"{load} {name}"] = run(make(is_balanced), swing, config, choose)
            if says:
                print(f"{load:9} {name:10} {found[f'{load} {name}']}", flush=True)
    for load in ("swinging", "balanced"):
        kept = [found[f"{load} {name}"]["attainment"] for name in ("controlled", "static")]
        found[f"{load} ratio"] = round(kept[0] / kept[1], 3)
    return found


def main() -> None:
    """Run, print and write the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--real", action="store_true", help="engines on this machine's CPU")
    args = parser.parse_args()
    if args.real:
        with tempfile.TemporaryDirectory() as folder:
            found = figures(REAL, lambda balanced: real_parties(REAL, balanced, Path(folder)), InTurn(), True)
    else:
        made = functools.partial(simulated_parties, SIMULATED)
        found = figures(SIMULATED, made, furthest_behind, True)
    told = {"bench": "swinging_load", "simulated": not args.real, "figure": found}
    print(json.dumps(told | {"commit": report.commit()}))


if __name__ == "__main__":
    main()
