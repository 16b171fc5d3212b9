"""Requests that end before what was planned for them has run: what they leave behind is what is there."""

from __future__ import annotations

import pytest

from engine.config import MemoryConfig, SchedulerConfig
from engine.messages import GenerateRequest, SamplingParams
from engine.sequence import Sequence
from tests.failing_memory import FailingVirtualMemory
from tests.fakes import CHUNK_BYTES, Bench
from tests.unit.engine_cases import expect, tokens

pytestmark = pytest.mark.usefixtures("steps_ahead")

T = 32  # tokens of a block


def request(name: str, prompt: tuple[int, ...], max_tokens: int = 5) -> GenerateRequest:
    return GenerateRequest(name, prompt, SamplingParams(max_tokens=max_tokens))


def run(bench: Bench, one: GenerateRequest) -> int:
    """Serves a request; how many tokens of its prompt were there."""
    bench.engine.submit(one)
    bench.run()
    expect(bench, one)
    bench.assert_idle()
    return bench.deltas[one.request_id].num_cached_tokens


def test_nobody_waits_for_a_block_whose_sequence_ended_within_it() -> None:
    """Its hash was announced when its prompt began, and its rest will never be computed."""
    bench = Bench(128, scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=T - 8))
    prompt = tokens("prompt", 2 * T + 6)
    bench.engine.submit(request("gone", prompt))
    bench.engine.step()
    bench.engine.cancel("gone")
    bench.run()
    assert run(bench, request("again", prompt)) == T - 8


def drafted_fork() -> tuple[Bench, GenerateRequest, Sequence]:
    """A fork with a block to copy, drafted and not launched: the driver might refuse."""
    bench = Bench(128, scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=128))
    chat = tokens("chat", T + 20)
    run(bench, request("chat", chat, 20))
    fork = request("fork", (*chat, *tokens("fork", 6)))
    bench.engine.submit(fork)
    bench.engine._apply_orders()
    assert bench.scheduler.schedule() is not None
    seq = bench.scheduler.get("fork")
    assert seq is not None
    assert seq.copy is not None
    return bench, fork, seq


def test_a_fork_that_ends_before_its_copy_was_made_leaves_the_copied_tokens_out() -> None:
    bench, fork, _ = drafted_fork()
    bench.engine.cancel("fork")
    assert run(bench, request("again", fork.prompt_token_ids)) == T + 20


def test_a_preempted_fork_whose_copy_was_not_made_computes_what_it_lacks() -> None:
    """The same, as it comes about: memory is short for the step that would have made the copy."""
    bench, fork, seq = drafted_fork()
    bench.scheduler.preempt(seq)
    bench.run()
    expect(bench, fork)


def test_a_block_is_there_until_it_has_been_copied() -> None:
    """A conversation goes on in place and fails, while another one still has to copy from its slot."""
    vm = FailingVirtualMemory(CHUNK_BYTES, 128)
    bench = Bench(128, scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=256), vm=vm)
    chat = tokens("chat", 2 * T + 20)
    run(bench, request("chat", chat, 1))
    fork = request("fork", (*chat[: T + 20], *tokens("fork", 30)))
    bench.engine.submit(fork)
    bench.engine.submit(request("on", (*chat, *bench.deltas["chat"].token_ids, *tokens("on", 40))))
    bench.engine._apply_orders()
    assert bench.scheduler.schedule() is not None  # both are open, and neither has been launched
    on, seq = bench.scheduler.get("on"), bench.scheduler.get("fork")
    assert on is not None
    assert seq is not None
    if seq.copy is None or on.slot != 0:
        pytest.fail("the case is not what it was meant to be")
    bench.scheduler.finish(on, "error", "the device refused to map memory")
    bench.pool.check()
    bench.run()
    expect(bench, fork)
    bench.assert_idle()
    vm.close()


def test_a_prompt_starts_although_every_other_slot_holds_what_it_would_read() -> None:
    """With one sequence at a time there are two slots: its match, and the source that one reads through."""
    bench = Bench(128, scheduler=SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=256))
    system = tokens("system", T)
    run(bench, request("first", (*system, *tokens("first", 40))))
    run(bench, request("second", (*system, *tokens("second", 50))))
    assert bench.pool.prefixes[1].source == 0
    run(bench, request("third", (*system, *tokens("second", 35), *tokens("third", 20))))


@pytest.mark.parametrize("call", ["map", "access"])
@pytest.mark.parametrize("after", range(9))
def test_a_prefix_that_cannot_be_mapped_once_more_is_computed_again(call: str, after: int) -> None:
    """Two blocks of a fork of a fork, in four layer groups: one of these calls is refused, or the next."""
    vm = FailingVirtualMemory(CHUNK_BYTES, 128)
    bench = Bench(128, MemoryConfig(map_ahead_tokens=0), max_model_len=320, vm=vm)
    system, chat = tokens("system", 2 * T), tokens("chat", 2 * T + 20)
    run(bench, request("first", (*system, *tokens("other", 70)), 2))
    run(bench, request("chat", (*system, *chat), 30))
    busy = request("busy", tokens("busy", 20), 10)  # so that steps are in flight, if they may be
    bench.engine.submit(busy)
    for _ in range(3):
        bench.engine.step()
    vm.refuse(call, after=after)
    assert run(bench, request("fork", (*system, *chat, *tokens("fork", 10)))) >= 2 * T
    expect(bench, busy)
    assert vm.refusals.num_refused[call] == 1
    vm.close()
