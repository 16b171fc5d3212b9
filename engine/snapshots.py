"""The state of an engine as others see it."""

from __future__ import annotations

from dataclasses import replace

from engine.messages import EngineInfo, EngineSnapshot, MemorySnapshot
from engine.orders import Orders
from engine.scheduler import Scheduler


def take_snapshot(
    info: EngineInfo,
    scheduler: Scheduler,
    memory: MemorySnapshot,
    now_s: float,
    num_steps: int,
    last_step_s: float,
    num_deposited: int,
    orders: Orders,
) -> EngineSnapshot:
    """Raw facts of this moment."""
    turns = scheduler.turns
    promises, steps = turns.promises, scheduler.step_times
    floor = orders.floor(scheduler.unfinished(), info.max_model_len) if info.shared_device else 0
    parkings = sum(count for name, count in turns.decisions.items() if name.startswith("park"))
    return EngineSnapshot(
        model_id=info.model_id,
        monotonic_s=now_s,
        num_waiting=scheduler.num_waiting,
        num_running=scheduler.num_running,
        num_steps=num_steps,
        num_preemptions=scheduler.num_preemptions,
        prompt_tokens=scheduler.prompt_tokens,
        generated_tokens=scheduler.generated_tokens,
        finished=tuple(scheduler.finished.items()),
        last_step_s=last_step_s,
        memory=replace(memory, balloon_logical=turns.num_allowed, floor=floor),
        prefix_queries=scheduler.prefix_queries,
        prefix_hits=scheduler.prefix_hits,
        num_parked=len(turns.parked),
        num_parked_late=turns.num_parked_late if turns.parked else 0,
        num_parkings=parkings,
        num_deposited=num_deposited,
        expected_ttft_s=scheduler.queue_time.first_token_s(0),
        decisions=tuple(turns.decisions.items()),
        first_in_time=promises.first_in_time,
        first_late=promises.first_late,
        paced_in_time=promises.paced_in_time,
        paced_late=promises.paced_late,
        num_waiting_late=scheduler.waiting.num_late,
        oldest_wait_s=scheduler.waiting.oldest_s(now_s),
        prompt_token_s=steps.per_prompt_token(0) if steps.is_fitted else 0.0,
        order=orders.last,
        order_age_s=orders.age_s,
        shared_device=info.shared_device,
    )
