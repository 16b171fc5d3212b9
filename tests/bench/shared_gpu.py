"""Two models on one GPU, and a load that swings from one to the other: memory lent, or halved for good.

    python -m tests.bench.shared_gpu

The real schedulers, pools and `decide`, in virtual time. Both engines compute on one simulated GPU, one step
after another, and take their chunks from one device, which refuses to give more than it has. What counts is
the share of all requests that got their first token and their pace as promised. The last line is JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from cluster.bench import report
from cluster.bench.summary import summarise
from cluster.policy import PolicyConfig
from engine.config import SchedulerConfig, SloConfig
from engine.simulated import NullVirtualMemory
from tests.bench.swinging_load import Party, Steering, Swing, drive_together, furthest_behind
from tests.shared_memory import OneDevice
from tests.simulation.world import CHUNK_BYTES, GIB, Gpu, SimulatedEngine

# Two models of the shape of Llama-3.1-8B in bf16 on a GPU of 48 GiB with an H100's speed: 16 of weights and a
# GiB of margin each leave 7 to each pool. A request needs 0.55 GiB of KV in the end: twelve fit.
SWING = Swing(4, 60.0, 30.0, 3.0, 0.05, 4000, 400, 0, 7 * GIB, 3.0, 0.06)


class PoolSteering(Steering):
    """Also looks at what pools may have and hold, and that requests are not failed."""

    def __init__(
        self, parties: Sequence[Party], swing: Swing, config: PolicyConfig | None, device: OneDevice
    ) -> None:
        super().__init__(parties, swing.host_bytes, swing.ttft_slo_s, config)
        self._device = device
        self.most = 0
        self.limits: list[tuple[float, tuple[int, ...]]] = []

    def tick(self, now_s: float) -> None:
        super().tick(now_s)
        memories = [party.engine.snapshot.memory for party in self._parties]
        assert sum(memory.created for memory in memories) == self._device.num_made
        self.limits.append((now_s, tuple(memory.limit for memory in memories)))
        self.most = max(self.most, sum(memory.limit for memory in memories))


def run(swing: Swing, config: PolicyConfig | None, is_balanced: bool = False) -> dict[str, Any]:
    """One run; its figures."""
    gpu, device = Gpu(), OneDevice(2 * swing.pool_bytes // CHUNK_BYTES)
    slo = SloConfig(swing.ttft_slo_s * 1e3, swing.tpot_slo_s * 1e3)
    limits = SchedulerConfig(max_num_seqs=128, max_num_batched_tokens=4096)
    parties = []
    for group in range(2):
        vm = NullVirtualMemory(CHUNK_BYTES)
        device.add(vm)
        engine = SimulatedEngine(swing.pool_bytes / GIB, 0.0, limits, slo, max_model_len=8192, gpu=gpu, vm=vm)
        load = swing.workload(group, is_balanced)
        parties.append(Party(f"group{group}", engine, load, engine.clock, engine.clock.advance))
    steering = PoolSteering(parties, swing, config, device)
    drive_together(parties, steering, furthest_behind)
    records = [record for party in parties for record in party.records()]
    duration_s = max(party.now_s for party in parties)
    objectives = {"ttft": swing.ttft_slo_s * 1e3, "tpot": swing.tpot_slo_s * 1e3}
    summary = report.figures(summarise(records, duration_s, objectives, (50.0, 99.0)))
    return {
        "attainment": summary["slo_attainment"]["all"],
        "goodput": round(_num_good(summary, len(records)) / duration_s, 3),
        "requests": len(records),
        "failed": sum(not record.succeeded for record in records),
        "duration_s": round(duration_s, 1),
        "p50_ttft_ms": round(summary["p50_ttft_ms"], 1),
        "p99_ttft_ms": round(summary["p99_ttft_ms"], 1),
        "moves": sum(
            action.action.startswith("pool") for one in steering.decisions for action in one.actions
        ),
        "seconds_to_three_quarters": follow_s(swing, steering.limits, device.num_chunks),
        "most_of_the_device": round(max(steering.most, device.most) / device.num_chunks, 4),
        "refused": device.num_refused,
    }


def _num_good(summary: dict[str, Any], count: int) -> float:
    """Requests that kept all their promises."""
    return float(summary["slo_attainment"]["all"]) * count


def follow_s(
    swing: Swing, limits: Sequence[tuple[float, tuple[int, ...]]], num_chunks: int
) -> list[float | None]:
    """Seconds from each swing of the load until the busy model may have three quarters of the device."""
    found: list[float | None] = []
    for period in range(swing.periods):
        begin_s = period * swing.period_s
        reached = [
            now_s - begin_s
            for now_s, both in limits
            if begin_s <= now_s < begin_s + swing.period_s and both[period % 2] >= 0.75 * num_chunks
        ]
        found.append(reached[0] if reached else None)
    return found


def main() -> None:
    """Run, print and write the JSON line."""
    found: dict[str, Any] = {}
    for load, is_balanced in (("swinging", False), ("balanced", True)):
        for name, config in (("static", None), ("lent", PolicyConfig())):
            found[f"{load} {name}"] = run(SWING, config, is_balanced)
            print(f"{load:9} {name:7} {found[f'{load} {name}']}", flush=True)
    print(json.dumps({"bench": "shared_gpu", "simulated": True, "figure": found, "commit": report.commit()}))


if __name__ == "__main__":
    main()
