"""Beginnings that the device gave up and the balloon still has: found, brought back, and nobody else's.

The pattern model reads every key and value back before each step, and what a copy has not brought yet is NaN.
"""

from __future__ import annotations

import pytest

from engine.config import MemoryConfig, SchedulerConfig
from engine.memory.copies import Direction
from engine.messages import GenerateRequest
from engine.sequence import State
from tests.fakes import Bench, HeldCopies
from tests.unit.engine_cases import computed, converse, expect, request, tokens
from tests.unit.parking_cases import filled, watch

pytestmark = pytest.mark.usefixtures("steps_ahead")

T, GROUPS = 32, 4  # tokens of a block, layer groups
MAX_STEPS = 5000


def crowded(total: int = 60, balloon_chunks: int = 400, policy: str = "slo") -> tuple[Bench, HeldCopies]:
    """An engine whose device holds hardly one conversation, beside a balloon that holds many."""
    copies = HeldCopies()
    limits = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64, policy=policy)  # type: ignore[arg-type]
    memory = MemoryConfig(map_ahead_tokens=0)
    bench = Bench(total, memory, limits, balloon_chunks=balloon_chunks, copies=copies)
    filled(bench.balloon)
    watch(bench.pool, copies)
    return bench, copies


def run(bench: Bench, copies: HeldCopies, *requests: GenerateRequest) -> None:
    """To the end; every copy ends a step after it was begun."""
    for one in requests:
        bench.engine.submit(one)
    for _ in range(MAX_STEPS):
        under_way = copies.under_way
        is_busy = bench.engine.step()
        bench.pool.check()
        for ticket in under_way:
            copies.end(ticket)
        if not is_busy:
            break
    for one in requests:
        expect(bench, one)
    bench.assert_idle()


def talk(bench: Bench, copies: HeldCopies, name: str, length: int = 150) -> list[int]:
    """A first turn; all that was said."""
    prompt = tokens(name, length)
    run(bench, copies, request(name, prompt, 20))
    return [*prompt, *bench.deltas[name].token_ids]


def others(bench: Bench, copies: HeldCopies, count: int = 5) -> None:
    """So many conversations that nothing else is left on the device."""
    for _ in range(count):
        talk(bench, copies, f"other{len(bench.deltas)}", 180)


def fetches(bench: Bench) -> int:
    return dict(bench.engine.snapshot.decisions).get("fetch_prefix", 0)


@pytest.mark.parametrize("policy", ["slo", "fcfs"])
def test_a_conversation_goes_on_after_others_took_its_memory(policy: str) -> None:
    bench, copies = crowded(policy=policy)
    said = talk(bench, copies, "a")
    others(bench, copies)
    hits = bench.engine.snapshot.prefix_hits
    computed(bench)
    run(bench, copies, request("b", [*said, 7, 8], 5))
    found = len(said) // T * T
    assert bench.deltas["b"].num_cached_tokens == found == 160
    assert bench.engine.snapshot.prefix_hits - hits == found
    assert computed(bench) == len(said) + 2 - found + 4
    assert fetches(bench) == 1


def test_without_host_memory_it_is_computed_again() -> None:
    """What the test above would see of an engine that finds nothing."""
    limits = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64)
    bench, copies = Bench(60, MemoryConfig(map_ahead_tokens=0), limits), HeldCopies()
    said = talk(bench, copies, "a")
    others(bench, copies)
    run(bench, copies, request("b", [*said, 7, 8], 5))
    assert bench.deltas["b"].num_cached_tokens < 160


def test_what_the_device_still_has_is_not_brought_back() -> None:
    bench, copies = crowded()
    said = talk(bench, copies, "a")
    others(bench, copies)
    run(bench, copies, request("again", [*said, 7], 2))
    bench.pool._slots.evict(bench.pool.num_evictable - 3 * GROUPS)  # from the end of what was used last
    before = copies.bytes_moved(Direction.IN)
    run(bench, copies, request("b", [*said, 7, 8], 5))
    assert copies.bytes_moved(Direction.IN) - before == 2 * GROUPS * bench.balloon.chunk_bytes
    assert bench.deltas["b"].num_cached_tokens == 5 * T


def test_prompts_that_begin_alike_bring_their_beginning_back_once() -> None:
    bench, copies = crowded()
    system = talk(bench, copies, "system")[:128]
    others(bench, copies)
    before = copies.bytes_moved(Direction.IN)
    asked = [request(f"r{at}", [*system, *tokens(f"own{at}", 10)], 5) for at in range(3)]
    run(bench, copies, *asked)
    assert copies.bytes_moved(Direction.IN) - before == 4 * GROUPS * bench.balloon.chunk_bytes
    assert [bench.deltas[one.request_id].num_cached_tokens for one in asked] == [128] * 3
    assert fetches(bench) == 1


def test_nobody_finds_what_another_salt_protects() -> None:
    bench, copies = crowded()
    prompt = tokens("secret", 150)
    run(bench, copies, request("a", prompt, salt="mine"))
    others(bench, copies)
    run(bench, copies, request("b", prompt, salt="yours"))
    assert (bench.deltas["b"].num_cached_tokens, fetches(bench)) == (0, 0)
    others(bench, copies)
    run(bench, copies, request("c", prompt, salt="mine"))
    assert bench.deltas["c"].num_cached_tokens == 128


def test_a_copy_that_fails_costs_time_and_no_token() -> None:
    bench, copies = crowded()
    said = talk(bench, copies, "a")
    others(bench, copies)
    copies.fails = lambda ticket: ticket.direction is Direction.IN
    run(bench, copies, request("b", [*said, 7, 8], 5))
    assert (bench.deltas["b"].num_cached_tokens, fetches(bench)) == (0, 1)
    copies.fails = lambda ticket: ticket.direction is Direction.OUT
    others(bench, copies)
    copies.fails = lambda ticket: False
    run(bench, copies, request("c", [*said, 7, 8], 5))
    assert bench.num_held == 0


@pytest.mark.parametrize("is_done", [False, True])
def test_who_waits_for_a_beginning_can_be_cancelled(is_done: bool) -> None:
    bench, copies = crowded()
    said = talk(bench, copies, "a")
    others(bench, copies)
    bench.engine.submit(request("b", [*said, 7, 8], 5))
    bench.engine.step()
    seq = bench.scheduler.get("b")
    assert seq is not None
    assert (seq.state, seq.is_arriving) == (State.PREFILLING, True)
    if is_done:
        copies.end()
    bench.engine.cancel("b")
    bench.engine.step()
    assert copies.under_way == []
    run(bench, copies, request("c", [*said, 9, 8], 5))
    assert bench.deltas["c"].num_cached_tokens == 160
    assert bench.num_held == 0


def test_others_go_on_while_a_beginning_arrives() -> None:
    bench, copies = crowded()
    said = talk(bench, copies, "a")
    others(bench, copies)
    bench.engine.submit(request("b", [*said, 7, 8], 5))
    bench.engine.submit(request("other", tokens("new", 20), 30))
    for _ in range(8):
        bench.engine.step()
    assert len(bench.deltas["other"].token_ids) > 3
    assert "b" not in bench.deltas
    run(bench, copies)
    assert bench.deltas["b"].num_cached_tokens == 160


def test_the_balloon_keeps_what_was_used_last() -> None:
    """Room for 8 blocks, of two conversations of 5: the later is found whole, of the other what is left."""
    bench, copies = crowded(balloon_chunks=8 * GROUPS)
    first, second = talk(bench, copies, "a"), talk(bench, copies, "b")
    bench.pool.trim(drops_cache=False)
    bench.pool._slots.evict(bench.pool.num_evictable)
    assert bench.pool.parking is not None
    assert bench.pool.parking.host.num_cached == 8 * GROUPS
    run(bench, copies, request("d", [*second, 7, 8], 2))
    assert bench.deltas["d"].num_cached_tokens == 5 * T
    bench.pool._slots.evict(bench.pool.num_evictable)
    run(bench, copies, request("c", [*first, 7, 8], 2))
    assert 0 < bench.deltas["c"].num_cached_tokens <= 3 * T


def test_a_dropped_cache_is_dropped_there_too() -> None:
    bench, copies = crowded()
    said = talk(bench, copies, "a")
    others(bench, copies)
    assert bench.engine.snapshot.memory.balloon_cached > 0
    bench.engine.trim(drop_cache=True)
    bench.engine.step()
    memory = bench.engine.snapshot.memory
    assert (memory.balloon, memory.balloon_cached, memory.cached) == (0, 0, 0)
    run(bench, copies, request("b", [*said, 7, 8], 5))
    assert bench.deltas["b"].num_cached_tokens == 0


def test_with_caching_off_nothing_is_kept() -> None:
    copies = HeldCopies()
    memory = MemoryConfig(map_ahead_tokens=0, enable_prefix_caching=False)
    limits = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64)
    bench = Bench(60, memory, limits, balloon_chunks=400, copies=copies)
    filled(bench.balloon)
    said = talk(bench, copies, "a")
    others(bench, copies)
    run(bench, copies, request("b", [*said, 7, 8], 5))
    assert (bench.deltas["b"].num_cached_tokens, bench.balloon.num_used) == (0, 0)


@pytest.mark.parametrize("seed", range(6))
def test_conversations_in_tight_memory(seed: int) -> None:
    """With a link that is its own thread."""
    chunks = [24, 60, 400][seed % 3]
    limits = SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=64, turn_tokens=1)
    bench = Bench(44, MemoryConfig(map_ahead_tokens=8), limits, balloon_chunks=chunks)
    filled(bench.balloon)
    converse(bench, seed)
    assert chunks == 24 or fetches(bench) > 0
    assert bench.num_held == 0
