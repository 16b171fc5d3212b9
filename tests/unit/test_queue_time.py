"""How long a new request would wait, by how fast prompts were computed while some were waiting."""

from __future__ import annotations

import pytest

from engine.queue_time import QueueTime


def _loaded(tokens_per_step: int, step_s: float, steps: int = 200) -> QueueTime:
    queue = QueueTime()
    for step in range(steps):
        queue.step(step * step_s, tokens_per_step, backlog=10_000)
    return queue


def test_nothing_is_known_at_first() -> None:
    assert QueueTime().first_token_s(10**6) == 0.0


def test_the_rate_is_that_of_prompts_beside_everything_else() -> None:
    assert _loaded(1000, 0.05).first_token_s(10_000) == pytest.approx(1.0, rel=0.02)


def test_idle_time_does_not_count() -> None:
    queue, now_s = QueueTime(), 0.0
    for _ in range(50):
        queue.step(now_s, 1000, backlog=0)
        queue.step(now_s + 0.1, 0, backlog=0)
        now_s += 60.0
    assert queue.first_token_s(10_000) == pytest.approx(1.0, rel=0.02)


def test_it_follows_the_load() -> None:
    queue = _loaded(1000, 0.05)
    for step in range(400):
        queue.step(10.0 + step * 0.05, 250, backlog=3_000)
    assert queue.first_token_s(2_000) == pytest.approx(1.0, rel=0.02)


def test_waiting_for_memory_is_waiting() -> None:
    queue = QueueTime()
    for step in range(400):
        queue.step(step * 0.05, 1000 if step % 4 == 0 else 0, backlog=5_000)
    assert queue.first_token_s(0) == pytest.approx(1.0, rel=0.05)
