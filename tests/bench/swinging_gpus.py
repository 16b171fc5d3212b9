"""The load of `swinging_load` on real engines: each group has a GPU, a process and a clock of its own.

    python -m tests.bench.swinging_gpus              # Llama-3.1-8B's shape on two GPUs, seven minutes

Both groups' host memory is divided equally for good, and then by the controller's `decide`, as there. Engines
are loaded once: before each run both have half of the host memory again, and no KV of the run before.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cluster.bench import report
from cluster.bench.summary import Record, summarise
from cluster.bench.workload import Workload
from cluster.policy import PolicyConfig, State
from engine.config import MIB, EngineConfig, MemoryConfig, ModelSource, SchedulerConfig, SloConfig
from engine.control import Order
from engine.messages import EngineSnapshot
from tests.bench.machine import machine
from tests.bench.models import write_llama_8b
from tests.bench.swinging_load import TICK_S, Party, Steering, Swing

GIB = 1024 * MIB
# A burst of 144 requests needs 21 GiB of KV at its end, of which the device has 1.5. A minute serves it.
H200 = Swing(2, 55.0, 8.0, 18.0, 0.05, 700, 512, 12 * GIB, 3 * GIB // 2, 2.0, 0.2, vocab_size=128_000)
_START_S, _ANSWER_S = 300.0, 60.0
_PAUSE_S = 0.002
_SETTLED_S = 1.0  # longer than it takes to pin a slab


@dataclass(frozen=True, slots=True)
class Look:
    """What a group's process says when it is asked."""

    snapshot: EngineSnapshot
    has_ended: bool
    records: list[Record]


class RemoteParty:
    """A group in another process. Implements `Governed`.

    Args:
        group: also the number of its GPU.
        config: of its engine.
    """

    def __init__(self, group: int, config: EngineConfig) -> None:
        self.name = f"group{group}"
        spawn = multiprocessing.get_context("spawn")
        self._ours, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(group, config, theirs), daemon=True)
        self._process.start()
        self.last: Look

    @property
    def snapshot(self) -> EngineSnapshot:
        """As it last said."""
        return self.last.snapshot

    def apply(self, order: Order) -> None:
        """Have an order followed."""
        self._ours.send(order)

    def run(self, workload: Workload) -> None:
        """Begin a load; its clock starts now."""
        self._ours.send(workload)

    def ask(self) -> None:
        """Have it say how things are; `hear` waits for that."""
        self._ours.send(None)

    def hear(self, timeout_s: float = _ANSWER_S) -> Look:
        """What it answers, also once it is loaded."""
        if not self._ours.poll(timeout_s):
            raise TimeoutError(f"{self.name} does not answer")
        self.last = self._ours.recv()
        return self.last

    def end(self) -> None:
        """Its process has nothing to put away."""
        self._process.kill()


def _serve(group: int, config: EngineConfig, link: Connection) -> None:
    """A group's process."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(group)
    from tests.bench.in_process import BallonetStepper

    engine = BallonetStepper(config)
    party: Party | None = None
    link.send(Look(engine.snapshot, False, []))
    while True:
        while link.poll():
            said = link.recv()
            if isinstance(said, Workload):
                party = Party(f"group{group}", engine, said, time.perf_counter, time.sleep)
            elif isinstance(said, Order):
                engine.engine.apply(said)
            else:
                has_ended = party is None or party.has_ended
                records = party.records() if party is not None and has_ended else []
                link.send(Look(engine.snapshot, has_ended, records))
        if party is None or party.has_ended:
            engine.step()
            engine.gains()
            time.sleep(_PAUSE_S)
        else:
            party.step(party.now_s + _PAUSE_S)


def _config(swing: Swing, folder: Path) -> EngineConfig:
    return EngineConfig(
        ModelSource("llama-8b", str(write_llama_8b(folder)), load_format="dummy"),
        MemoryConfig(
            pool_bytes=swing.pool_bytes, balloon_bytes=swing.host_bytes // 2, enable_prefix_caching=False
        ),
        SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=2048),
        SloConfig(swing.ttft_slo_s * 1e3, swing.tpot_slo_s * 1e3),
        device="cuda",
        max_model_len=4096,
    )


def run(
    parties: list[RemoteParty], swing: Swing, is_balanced: bool, config: PolicyConfig | None
) -> dict[str, Any]:
    """One run; its figures."""
    epoch = _halve(parties, swing)
    state = State(epoch + 1)  # not `recovered`: these groups have not just been moved by a controller
    steering = Steering(parties, swing.host_bytes, swing.ttft_slo_s, config, state)
    for group, party in enumerate(parties):
        party.run(swing.workload(group, is_balanced))
    started, looks = time.monotonic(), _look(parties)
    while not all(look.has_ended for look in looks):
        steering.tick(time.monotonic() - started)
        time.sleep(TICK_S - (time.monotonic() - started) % TICK_S)
        looks = _look(parties)
    records = [record for look in looks for record in look.records]
    objectives = {"ttft": swing.ttft_slo_s * 1e3, "tpot": swing.tpot_slo_s * 1e3}
    summary = report.figures(summarise(records, time.monotonic() - started, objectives, (50.0, 99.0)))
    most = max(sum(map(max, limits, held)) for _, limits, held in steering.history)
    return {
        "attainment": summary["slo_attainment"]["all"],
        "requests": len(records),
        "duration_s": round(time.monotonic() - started, 1),
        "p50_ttft_ms": round(summary["p50_ttft_ms"], 1),
        "p99_ttft_ms": round(summary["p99_ttft_ms"], 1),
        "orders": sum(len(one.instructions) for one in steering.decisions),
        "most_host_gib": round(most / GIB, 3),
    }


def _look(parties: list[RemoteParty]) -> list[Look]:
    for party in parties:
        party.ask()
    return [party.hear() for party in parties]


def _halve(parties: list[RemoteParty], swing: Swing) -> int:
    """Give both groups half of the host memory, and wait until they have it; the order's epoch."""
    half = swing.host_bytes // 2
    orders = [look.snapshot.order for look in _look(parties)]
    epoch = 1 + max(order.epoch if order else 0 for order in orders)
    for party in parties:
        party.apply(Order(epoch, 0, half, half))
    until, held = time.monotonic() + _ANSWER_S, [-1]
    while held != (held := [_held_chunks(look.snapshot, half) for look in _look(parties)]) or -1 in held:
        if time.monotonic() > until:
            raise TimeoutError("host memory was not divided in halves again")
        time.sleep(_SETTLED_S)
    return epoch


def _held_chunks(snapshot: EngineSnapshot, most_bytes: int) -> int:
    """Host memory of a group that may have so much; -1 while it may have more or less, or has more."""
    memory = snapshot.memory
    most = most_bytes // memory.chunk_bytes
    return memory.balloon_physical if memory.balloon_limit == most >= memory.balloon_physical else -1


def figures(swing: Swing, config: EngineConfig) -> dict[str, Any]:
    """Both loads, each with and without the controller."""
    parties = [RemoteParty(group, config) for group in range(2)]
    found: dict[str, Any] = {}
    try:
        for party in parties:
            party.hear(_START_S)
        for load, periods in (("swinging", swing.periods), ("balanced", 1)):
            asked = replace(swing, periods=periods)
            for name, policy in (("static", None), ("controlled", PolicyConfig())):
                found[f"{load} {name}"] = run(parties, asked, load == "balanced", policy)
                print(f"{load:9} {name:10} {found[f'{load} {name}']}", flush=True)
            kept = [found[f"{load} {name}"]["attainment"] for name in ("controlled", "static")]
            found[f"{load} ratio"] = round(kept[0] / kept[1], 3)
    finally:
        for party in parties:
            party.end()
    return found


def main() -> None:
    """Prints one line a run, and a JSON line at the end."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = figures(H200, _config(H200, Path(folder)))
    print(json.dumps({"bench": "swinging_gpus", "figure": found, **machine()}))


if __name__ == "__main__":
    main()
