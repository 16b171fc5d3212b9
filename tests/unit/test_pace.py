"""Prompts are spread over steps while sequences decode, and no longer than that pays."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import MemoryConfig, Policy, SchedulerConfig
from engine.errors import ConfigError
from engine.memory.blocks import TokenChain
from engine.messages import GenerateRequest, SamplingParams
from engine.pace import Backlog, Pace, backlog_of
from engine.sequence import Sequence
from engine.step_times import StepTimes, StepWork
from tests.fakes import Bench
from tests.unit.engine_cases import ask, finish

STEP = 4096


def _prompt(length: int, computed: int = 0, found: int = 0) -> Sequence:
    request = GenerateRequest("r", (1,) * length, SamplingParams(max_tokens=8))
    return Sequence(request, 0, 0.0, TokenChain("", 16), num_computed=computed, num_found=found)


def _tokens(
    decodes: int,
    prompts: list[Sequence] | None = None,
    next_lacks: int = 0,
    waiting: int = 0,
    steps: int = 16,
) -> int:
    limits = SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=STEP, prefill_spread_steps=steps)
    begun = backlog_of(prompts or [], None, None)
    backlog = Backlog(begun.first or next_lacks, begun.tokens + waiting)
    return decodes + Pace(limits, StepTimes()).prompt_tokens([_prompt(1)] * decodes, backlog, math.inf)


def _fitted() -> StepTimes:
    """7 ms for the weights, 25 us a prompt token: what an 8B model takes on an H100."""
    times = StepTimes()
    for tokens in range(0, 4096, 64):
        work = StepWork(tokens, tokens % 5, tokens % 7 * 1000)
        times.observe(work, 7e-3 + tokens * 25e-6)
    return times


def _hurried(due: list[tuple[int, float]], bearable_s: float = math.inf, share: float = 1.0) -> int:
    limits = SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=STEP)
    backlog = Backlog(due[0][0], sum(tokens for tokens, _ in due), due)
    return Pace(limits, _fitted()).prompt_tokens([_prompt(1)] * 8, backlog, bearable_s, share)


def test_what_is_due_soon_is_not_spread() -> None:
    leisurely = _hurried([(8000, 10.0)])
    assert leisurely == pytest.approx(8000 * 4 / (16 * (1 - 8 / 256)), rel=0.01)
    # 8,000 tokens in 0.25 s: 200 ms of products leave 50 ms for 7 ms of weights a step, 7 steps.
    assert _hurried([(8000, 0.3)]) == leisurely
    assert 8000 / 7 < _hurried([(8000, 0.22)]) < STEP
    assert _hurried([(8000, 0.1)]) == STEP - 8


def test_the_prompt_behind_can_be_what_hurries() -> None:
    assert _hurried([(1000, 5.0), (8000, 0.2)]) > _hurried([(1000, 5.0), (8000, 9.0)])


def test_a_step_is_no_longer_than_others_can_bear() -> None:
    assert _hurried([(8000, 0.1)], bearable_s=0.067) == pytest.approx((0.067 - 0.007) / 25e-6, rel=0.05)


def _beside_promises(tpot_slo_ms: float, policy: Policy = "slo") -> int:
    """Tokens of a step of up to 16,384 beside decodes, when everything is due at once."""
    limits = SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=16_384, policy=policy)
    running = [replace(_prompt(1), tpot_slo_s=tpot_slo_ms / 1e3) for _ in range(8)]
    backlog = Backlog(8000, 10**6, [(8000, 0.1)])
    return Pace(limits, _fitted()).prompt_tokens(running, backlog, math.inf)


def test_a_step_is_no_longer_than_the_pace_of_next_tokens_if_shorter_ones_are_as_good() -> None:
    assert _beside_promises(150) == pytest.approx((0.15 - 0.007) / 25e-6, rel=0.05)
    assert _beside_promises(20) == 2048  # shorter ones would be slower for each token
    assert _beside_promises(1000) == _beside_promises(200) == pytest.approx((0.2 - 0.007) / 25e-6, rel=0.05)
    assert _beside_promises(20, policy="fcfs") == 16_384 - 8


def test_feedback_takes_a_share_of_the_step() -> None:
    assert _hurried([(8000, 0.1)], share=0.25) == (STEP - 8) // 4
    assert _hurried([(8000, 0.1)], share=0.01) == 512


def test_late_prompts_hurry_nobody() -> None:
    late, soon = _prompt(100), _prompt(50)
    late.ttft_slo_s, soon.ttft_slo_s = 1.0, 10.0
    assert [tokens for tokens, _ in backlog_of([late, soon], None, 2.0).due] == [50]


def test_a_short_prompt_comes_in_one_step() -> None:
    assert _tokens(64, next_lacks=500, waiting=500) >= 64 + 500


def test_one_long_prompt_takes_a_quarter_of_the_steps() -> None:
    assert _tokens(1, next_lacks=8000, waiting=8000) == pytest.approx(8000 / 4, rel=0.01)


def test_it_keeps_its_pace_until_it_is_computed() -> None:
    assert _tokens(1, [_prompt(8000, computed=7000)]) == _tokens(1, [_prompt(8000)])


def test_what_was_there_does_not_count() -> None:
    assert _tokens(0, [_prompt(8000, computed=6000, found=6000)]) == 512


def test_many_prompts_are_spread_over_all_steps() -> None:
    assert _tokens(1, next_lacks=100, waiting=32_000) == pytest.approx(32_000 / 16, rel=0.01)


def test_with_more_decodes_fewer_steps_are_taken() -> None:
    sizes = [_tokens(decodes, next_lacks=100, waiting=16_000) - decodes for decodes in (1, 64, 128, 200)]
    assert sizes == sorted(sizes)
    assert sizes[0] < 1100 < 2000 <= sizes[2]
    assert _tokens(256, next_lacks=100, waiting=16_000) == STEP


def test_one_step_means_every_step_is_filled() -> None:
    assert _tokens(8, next_lacks=100, waiting=100, steps=1) == STEP
    with pytest.raises(ConfigError, match="prefill_spread_steps"):
        SchedulerConfig(prefill_spread_steps=0)


@given(st.integers(0, 256), st.integers(0, 100_000), st.integers(0, 10**6), st.integers(1, 64))
def test_a_step_is_within_its_limits(decodes: int, first: int, others: int, steps: int) -> None:
    size = _tokens(decodes, next_lacks=first, waiting=first + others, steps=steps)
    assert decodes + 1 <= size <= STEP


def _bench(total_chunks: int, steps: int = 16) -> Bench:
    limits = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=2048, prefill_spread_steps=steps)
    return Bench(total_chunks, MemoryConfig(enable_prefix_caching=False), limits, max_model_len=4200)


@pytest.mark.parametrize("steps", [1, 16])
def test_a_decode_goes_on_beside_a_long_prompt(steps: int) -> None:
    bench = _bench(2000, steps)
    requests = [ask("decode", 5, 30), ask("long", 4000, 3)]
    bench.engine.submit(requests[0])
    bench.engine.step()
    bench.engine.submit(requests[1])
    while "long" not in bench.deltas or not bench.deltas["long"].finish_reason:
        bench.engine.step()
    sizes = [len(p.token_ids) for plan in bench.runner.plans for p in plan.pieces if p.request_id == "long"]
    prompt = [size for size in sizes if size > 1]
    assert sum(prompt) == 4000
    assert max(prompt) <= (2047 if steps == 1 else 1100)
    assert len(prompt) == (2 if steps == 1 else 4)
    finish(bench, requests)


def test_a_prompt_that_waits_for_memory_does_not_hurry_the_others() -> None:
    """It could not start however large the step is."""
    bench = _bench(800)
    requests = [ask("decode", 2500, 400), ask("waits", 4000, 1), ask("long", 4000, 1)]
    bench.engine.submit(requests[0])
    for _ in range(4):
        bench.engine.step()
    for request in requests[1:]:
        bench.engine.submit(request)
    for _ in range(20):
        bench.engine.step()
    assert bench.engine.snapshot.num_waiting == 2
    assert bench.scheduler._step_tokens(bench.scheduler._decodable(), [], 0.0) <= 513
    finish(bench, requests)
