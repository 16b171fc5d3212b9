"""The state of an engine as others see it."""

from __future__ import annotations

from dataclasses import replace

from engine.messages import EngineSnapshot, MemorySnapshot
from engine.scheduler import Scheduler


def take_snapshot(
    model_id: str,
    scheduler: Scheduler,
    memory: MemorySnapshot,
    now_s: float,
    num_steps: int,
    last_step_s: float,
    num_deposited: int,
) -> EngineSnapshot:
    """Raw facts of this moment."""
    turns = scheduler.turns
    parkings = sum(count for name, count in turns.decisions.items() if name.startswith("park"))
    return EngineSnapshot(
        model_id=model_id,
        monotonic_s=now_s,
        num_waiting=scheduler.num_waiting,
        num_running=scheduler.num_running,
        num_steps=num_steps,
        num_preemptions=scheduler.num_preemptions,
        prompt_tokens=scheduler.prompt_tokens,
        generated_tokens=scheduler.generated_tokens,
        finished=tuple(scheduler.finished.items()),
        last_step_s=last_step_s,
        memory=replace(memory, balloon_logical=turns.num_allowed),
        prefix_queries=scheduler.prefix_queries,
        prefix_hits=scheduler.prefix_hits,
        num_parked=len(turns.parked),
        num_parkings=parkings,
        num_deposited=num_deposited,
        expected_ttft_s=scheduler.queue_time.first_token_s(0),
        decisions=tuple(turns.decisions.items()),
    )
