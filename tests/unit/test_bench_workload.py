"""Workloads: the same for the same seed, and as their options ask."""

from __future__ import annotations

import hashlib
import math
import statistics

import pytest

from cluster.bench.named import named_workload, workload_names
from cluster.bench.workload import (
    BenchError,
    PlannedRequest,
    RandomPlan,
    Workload,
    arrival_times,
    with_arrivals,
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
        ("growth-256x100+500", "c4dc0227db2093a1"),
        ("demo-shared-8x128+16+8", "a438490e3d9b4b60"),
        ("demo-chats-4x3x96", "5f74771faf2d26df"),
    ],
)
def test_named_workloads_are_the_same_on_every_machine(name: str, digest: str) -> None:
    """Figures of two commits compare only if the token ids do: changing these is changing the benchmark."""
    assert _digest(named_workload(name)) == digest


CHATS = [name for name in workload_names() if "chats-" in name]
PROMPTS = [name for name in workload_names() if name not in (*CHATS, "mixed-load")]


@pytest.mark.parametrize("name", PROMPTS)
def test_names_say_what_is_in_them(name: str) -> None:
    shape = name.split("-poisson")[0].split("-")[-1]
    counts, *lengths, output = shape.split("+")
    count, _, first = counts.rpartition("x")
    prompt = sum(map(int, (first, *lengths)))
    workload = named_workload(name)
    assert len(workload.requests) == int(count or 1)
    assert {request.prompt_tokens for request in workload.requests} == {prompt}
    assert {request.output_tokens for request in workload.requests} == {int(output)}
    tokens = workload.token_ids(workload.requests[0])
    assert len(tokens) == prompt
    assert all(1000 <= token < workload.vocab_size for token in tokens)
    if lengths:
        shared = [tuple(workload.token_ids(r)[: int(first)]) for r in workload.requests[:3]]
        assert len(set(shared)) == 1


@pytest.mark.parametrize("name", CHATS)
def test_names_of_chats_say_what_is_in_them(name: str) -> None:
    num_chats, num_turns, added = map(int, name.split("-")[-1].split("x"))
    workload = named_workload(name)
    requests, said = workload.requests, dict[int, int]()
    assert len(requests) == num_chats * num_turns
    for place, request in enumerate(requests):
        # Tokens of the conversation so far.
        before = 0 if request.follows is None else said[request.follows]
        assert (request.follows is None) == (place < num_chats)
        assert request.prompt_tokens == before + len(workload.token_ids(request))
        said[place] = request.prompt_tokens + request.output_tokens
        assert said[place] - before == added
    assert [len(later) for later in workload.followers().values()] == [1] * num_chats * (num_turns - 1)
    assert {8 * request.output_tokens for request in requests} == {added}


def test_the_mixed_load_has_lengths_of_every_scale() -> None:
    workload = named_workload("mixed-load")
    for lengths, shortest, longest in (
        ([request.prompt_tokens for request in workload.requests], 16, 16_384),
        ([request.output_tokens for request in workload.requests], 1, 1_024),
    ):
        assert (min(lengths), max(lengths) <= longest) == (shortest, True)
        doublings = [int(math.log2(length / shortest)) for length in lengths]
        counts = [doublings.count(doubling) for doubling in range(10)]
        assert min(counts) > 0.5 * len(lengths) / 10  # a length of 1 has half a doubling
    assert workload.requests[-1].arrival_s == pytest.approx(600.0)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(BenchError, match=r"'nope'.*8b-256x512\+256"):
        named_workload("nope")


def test_random_prompts_have_a_name_of_any_size() -> None:
    workload = named_workload("random-3x20+5-poisson1.5")
    assert [(r.prompt_tokens, r.output_tokens) for r in workload.requests] == [(20, 5)] * 3
    assert workload.requests[-1].arrival_s == pytest.approx(2.0)
    at_once = named_workload("demo-random-3x20+5")
    assert {request.arrival_s for request in at_once.requests} == {0.0}
    assert at_once.vocab_size < workload.vocab_size
    assert _digest(workload) == _digest(named_workload(workload.name)) == "1ac12d800d6badca"


def test_two_random_loads_share_no_prompt() -> None:
    one, other = (named_workload(f"random-2x20+5-poisson{rate}") for rate in ("1", "2"))
    assert one.token_ids(one.requests[0]) != other.token_ids(other.requests[0])
    for name in ("random-0x20+5", "random-2x20+5-poisson0"):
        with pytest.raises(BenchError, match="must be"):
            named_workload(name)


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


def test_a_rate_is_of_first_turns() -> None:
    moved = with_arrivals(named_workload("demo-chats-4x3x96"), 2.0, math.inf)
    assert [request.arrival_s for request in moved.requests] == [0.5, 1.0, 1.5, 2.0] + [0.0] * 8
    assert moved.followers() == named_workload("demo-chats-4x3x96").followers()


def test_a_part_of_a_workload_keeps_its_sessions() -> None:
    whole = named_workload("demo-chats-4x3x96")
    part = whole.only([1, 3, 5, 9])
    assert [request.follows for request in part.requests] == [None, None, 0, 2]
    assert [part.token_ids(r) for r in part.requests] == [
        whole.token_ids(whole.requests[i]) for i in (1, 3, 5, 9)
    ]


def test_probes_of_sessions_stand_alone() -> None:
    workload = named_workload("demo-chats-4x3x96")
    assert {probe.follows for probe in workload.probes(12)} == {None}


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
