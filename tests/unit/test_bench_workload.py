"""Workloads: the same for the same seed, and as their options ask."""

from __future__ import annotations

import hashlib
import math
import statistics

import pytest

from cluster.bench.workload import (
    BenchError,
    PlannedRequest,
    RandomPlan,
    Workload,
    arrival_times,
    named_workload,
    with_arrivals,
    workload_names,
)


def _digest(workload: Workload) -> str:
    """Of everything an engine would see."""
    parts = [f"{r.arrival_s:.6f} {r.output_tokens} {workload.token_ids(r)}" for r in workload.requests]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("8b-256x512+256", "89b9df9bf172e2b6"),
        ("single-512+256", "6f476c12dc9ee732"),
        ("demo-12x64+32-poisson2", "444d446105737eca"),
    ],
)
def test_named_workloads_are_the_same_on_every_machine(name: str, digest: str) -> None:
    """Figures of two commits compare only if the token ids do: changing these is changing the benchmark."""
    assert _digest(named_workload(name)) == digest


@pytest.mark.parametrize("name", workload_names())
def test_names_say_what_is_in_them(name: str) -> None:
    shape = name.split("-poisson")[0].split("-")[-1]
    counts, output = shape.split("+")
    count, _, prompt = counts.rpartition("x")
    workload = named_workload(name)
    assert len(workload.requests) == int(count or 1)
    assert {request.prompt_tokens for request in workload.requests} == {int(prompt)}
    assert {request.output_tokens for request in workload.requests} == {int(output)}
    tokens = workload.token_ids(workload.requests[0])
    assert len(tokens) == int(prompt)
    assert all(1000 <= token < workload.vocab_size for token in tokens)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(BenchError, match=r"'nope'.*8b-256x512\+256"):
        named_workload("nope")


def test_prompts_differ_between_requests_and_share_the_prefix() -> None:
    workload = RandomPlan(3, 50, 5, prefix_len=20).workload("w")
    prompts = [workload.token_ids(request) for request in workload.requests]
    assert [len(prompt) for prompt in prompts] == [70, 70, 70]
    assert prompts[0][:20] == prompts[1][:20] == prompts[2][:20]
    assert len({tuple(prompt[20:]) for prompt in prompts}) == 3


def test_probes_have_the_lengths_of_the_requests_and_none_of_their_tokens() -> None:
    """A server with a prefix cache must find nothing of the measured prompts in it."""
    workload = RandomPlan(2, 50, 5, prefix_len=20).workload("w")
    probes = workload.probes(3)
    assert [(probe.prompt_tokens, probe.output_tokens) for probe in probes] == [(70, 5)] * 3
    first_tokens = {tuple(workload.token_ids(r)[:4]) for r in (*workload.requests, *probes)}
    assert len(first_tokens) == 1 + 3  # the shared prefix, and one for each probe


def test_probes_of_a_text_are_text() -> None:
    request = PlannedRequest(2.0, 5, 7, text="What is the capital of France?")
    (probe,) = Workload("w", (request,), seed=0).probes(1)
    assert (probe.arrival_s, probe.output_tokens) == (0.0, 7)
    assert probe.text is not None
    assert probe.text != request.text
    assert len(probe.text.split()) == 5


def test_another_seed_is_another_workload() -> None:
    first, second = (RandomPlan(2, 50, 5, request_rate=1.0, seed=seed).workload("w") for seed in (0, 1))
    assert first.token_ids(first.requests[0]) != second.token_ids(second.requests[0])
    assert first.requests[0].arrival_s != second.requests[0].arrival_s


def test_lengths_vary_within_the_ratio() -> None:
    workload = RandomPlan(200, 100, 40, range_ratio=0.5).workload("w")
    prompts = [request.prompt_tokens for request in workload.requests]
    outputs = [request.output_tokens for request in workload.requests]
    assert (min(prompts) >= 50, max(prompts) <= 150) == (True, True)
    assert (min(outputs) >= 20, max(outputs) <= 60) == (True, True)
    assert len(set(prompts)) > 50
    assert abs(statistics.fmean(prompts) - 100) < 10


def test_words_are_about_one_a_token() -> None:
    workload = RandomPlan(1, 30, 5).workload("w")
    assert len(workload.words(workload.requests[0]).split()) == 30


def test_arrivals_end_at_the_count_over_the_rate() -> None:
    times = arrival_times(500, 4.0, 1.0, seed=3)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(125.0)
    assert times == arrival_times(500, 4.0, 1.0, seed=3)


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (0.25, 2.0), (100.0, 0.1)])
def test_burstiness_is_the_shape_of_the_gaps(burstiness: float, variation: float) -> None:
    """The coefficient of variation of a gamma distribution is one over the root of its shape."""
    times = arrival_times(4000, 10.0, burstiness, seed=1)
    gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    measured = statistics.pstdev(gaps) / statistics.fmean(gaps)
    assert measured == pytest.approx(variation, rel=0.15)


def test_infinite_rate_and_infinite_burstiness() -> None:
    assert arrival_times(3, math.inf, 1.0, 0) == [0.0, 0.0, 0.0]
    assert arrival_times(3, 2.0, math.inf, 0) == [0.5, 1.0, 1.5]


def test_arrivals_can_be_replaced() -> None:
    workload = RandomPlan(3, 10, 5).workload("w")
    moved = with_arrivals(workload, 2.0, math.inf)
    assert [request.arrival_s for request in moved.requests] == [0.5, 1.0, 1.5]
    assert [moved.token_ids(r) for r in moved.requests] == [workload.token_ids(r) for r in workload.requests]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (RandomPlan(0, 1, 1), "--num-prompts must be at least 1"),
        (RandomPlan(1, 1, 0), "--random-output-len must be at least 1"),
        (RandomPlan(1, 0, 1), "a prompt needs a token"),
        (RandomPlan(1, 1, 1, range_ratio=1.0), "--random-range-ratio"),
        (RandomPlan(1, 1, 1, request_rate=0.0), "--request-rate must be positive"),
        (RandomPlan(1, 1, 1, request_rate=math.nan), "--request-rate must be positive"),
        (RandomPlan(1, 1, 1, request_rate=1.0, burstiness=0.0), "--burstiness must be positive"),
    ],
)
def test_numbers_that_make_no_workload(plan: RandomPlan, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        plan.workload("w")
