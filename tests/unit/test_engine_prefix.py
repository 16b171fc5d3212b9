"""Prompts that begin alike: what is computed once, read by many, and still everybody's own."""

from __future__ import annotations

import random

import pytest

from engine.config import MemoryConfig, Mode, SchedulerConfig
from engine.messages import GenerateRequest
from tests.fakes import Bench
from tests.unit.engine_cases import ask, computed, converse, expect, finish, request, tokens

pytestmark = pytest.mark.usefixtures("steps_ahead")

T = 32  # tokens of a block


def run(bench: Bench, *requests: GenerateRequest) -> None:
    for one in requests:
        bench.engine.submit(one)
    bench.run()
    for one in requests:
        expect(bench, one)


def cached(bench: Bench, name: str) -> int:
    return bench.deltas[name].num_cached_tokens


def test_the_next_turn_goes_on_in_place() -> None:
    bench = Bench(memory=MemoryConfig(map_ahead_tokens=0))
    first = tokens("first", 50)
    run(bench, request("a", first, 20))
    calls, said = (bench.vm.num_calls, bench.vm.num_calls_beside), bench.deltas["a"].token_ids
    computed(bench)
    run(bench, request("b", [*first, *said, *tokens("more", 8)], 4))
    assert cached(bench, "b") == 50 + 19, "everything but the last token, whose KV nobody needed"
    assert computed(bench) == 1 + 8 + 3
    assert (bench.vm.num_calls, bench.vm.num_calls_beside) == calls, "no driver call"
    assert not bench.runner.plans
    bench.assert_idle()


def test_a_short_conversation_goes_on_too() -> None:
    """Shorter than a block, it is found by its tokens."""
    bench = Bench()
    run(bench, request("a", tokens("x", 5), 3))
    run(bench, request("b", [*tokens("x", 5), *bench.deltas["a"].token_ids, 7], 3))
    assert cached(bench, "b") == 7


def test_prompts_that_begin_alike_are_computed_once_even_in_one_step() -> None:
    bench = Bench(128, scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=256))
    system = tokens("system", 3 * T)
    requests = [request(f"r{i}", [*system, *tokens(f"own{i}", 10)]) for i in range(8)]
    for one in requests:
        bench.engine.submit(one)
    bench.engine.step()
    assert bench.runner.plans[0].num_tokens == 3 * T + 8 * 10
    assert not bench.runner.plans[0].copies
    bench.run()
    for one in requests:
        expect(bench, one)
    assert [cached(bench, one.request_id) for one in requests] == [0] + 7 * [3 * T]
    assert (bench.engine.snapshot.prefix_queries, bench.engine.snapshot.prefix_hits) == (8 * 106, 7 * 96)
    bench.assert_idle()


def test_sharing_costs_no_driver_call_for_what_is_shared() -> None:
    bench = Bench(128, MemoryConfig(map_ahead_tokens=0))
    system = tokens("system", 4 * T)
    run(bench, request("first", [*system, 5], 2))
    before = bench.vm.num_calls + bench.vm.num_calls_beside
    run(bench, request("second", [*system, 6], 2))
    groups = bench.pool.kv.geometry.num_groups
    assert bench.vm.num_calls + bench.vm.num_calls_beside - before <= 2 * groups  # one row, made and mapped


def test_a_prompt_being_computed_is_waited_for() -> None:
    """Its pieces take several steps: whoever needs the same does not compute it beside it."""
    bench = Bench(128, scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=40))
    system = tokens("system", 5 * T)
    run(bench, *[request(f"r{i}", [*system, *tokens(f"own{i}", 6)], 3) for i in range(4)])
    assert computed(bench) == 5 * T + 4 * (6 + 2)
    bench.assert_idle()


def test_a_fork_of_a_fork_maps_what_its_source_reads_elsewhere_and_copies_the_rest() -> None:
    bench = Bench(128, max_model_len=320)
    system, chat = tokens("system", 2 * T), tokens("chat", 2 * T + 20)
    run(bench, request("first", [*system, *tokens("other", 70)], 2))
    run(bench, request("chat", [*system, *chat], 30))
    said = bench.deltas["chat"].token_ids
    computed(bench)
    forks = [request(f"fork{i}", [*system, *chat, *tokens(f"fork{i}", 10)], 3) for i in range(3)]
    for one in forks:
        bench.engine.submit(one)
    bench.engine.step()
    plan = bench.runner.plans[0]
    assert all(piece.shared_tokens == 2 * T for piece in plan.pieces)
    assert len(plan.copies) == 3
    bench.run()
    for one in forks:
        expect(bench, one)
        assert cached(bench, one.request_id) == 4 * T + 20
    run(bench, request("on", [*system, *chat, *said, 9], 3))
    assert cached(bench, "on") == 4 * T + 20 + 29, "the forks left the chat as it was"
    bench.assert_idle()


def test_salts_keep_apart() -> None:
    bench = Bench()
    prompt = tokens("p", 70)
    run(bench, request("a", prompt, salt="one"))
    run(bench, request("b", prompt, salt="two"))
    assert cached(bench, "b") == 0
    run(bench, request("c", prompt, salt="one"))
    assert cached(bench, "c") == 69


def test_nothing_is_kept_where_it_is_not_wanted() -> None:
    bench = Bench(memory=MemoryConfig(enable_prefix_caching=False))
    run(bench, request("a", tokens("p", 70)))
    assert bench.pool.snapshot().cached == 0
    run(bench, request("b", tokens("p", 70)))
    assert cached(bench, "b") == 0
    assert bench.engine.snapshot.prefix_queries == 0, "nobody looked"


def test_what_a_failed_request_computed_is_not_kept() -> None:
    """It may be what made it fail."""
    bench = Bench()
    bench.sampler.broken.add("bad")
    bench.engine.submit(request("bad", tokens("p", 70)))
    bench.run()
    assert bench.deltas["bad"].finish_reason == "error"
    assert bench.pool.snapshot().cached == 0
    run(bench, request("good", tokens("p", 70)))
    assert cached(bench, "good") == 0


def test_readers_of_a_prompt_that_is_never_finished_start_again() -> None:
    config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=128)
    bench = Bench(128, scheduler=config)
    system = tokens("system", 3 * T)
    readers = [request(f"r{i}", [*system, *tokens(f"own{i}", 6)], 3) for i in range(2)]
    bench.engine.submit(request("source", [*system, 5], 3))
    for one in readers:
        bench.engine.submit(one)
    bench.engine._apply_orders()
    assert bench.scheduler.schedule() is not None  # drafted, and not launched: the driver might refuse
    assert bench.scheduler.num_running == 3
    bench.engine.cancel("source")
    finish(bench, readers)


def test_memory_goes_to_sequences_before_it_is_kept() -> None:
    """Old conversations give way, from their end, and the next turn computes only what was given up."""
    bench = Bench(60)
    first = tokens("first", 120)
    run(bench, request("a", first, 8))
    for index in range(3):
        run(bench, ask(f"other{index}", 140, 8))
    assert bench.scheduler.num_preemptions == 0
    run(bench, request("b", [*first, *bench.deltas["a"].token_ids, 3], 4))
    assert cached(bench, "b") % T == 0
    bench.assert_idle()


def test_what_a_waiting_request_will_read_is_given_up_last() -> None:
    bench = Bench(60, scheduler=SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=256))
    wanted, unwanted = tokens("wanted", 80), tokens("unwanted", 80)
    run(bench, request("w", wanted, 4))
    run(bench, request("u", unwanted, 4))  # used later, and nobody asks for it
    bench.engine.submit(ask("big", 150, 4))
    bench.engine.submit(request("next", [*wanted, *bench.deltas["w"].token_ids, 4], 4))
    bench.run()
    assert cached(bench, "next") == 83
    bench.assert_idle()


def _chat(max_overtaken: int, num_chats: int = 12, num_turns: int = 5) -> tuple[Bench, list[str]]:
    """More conversations than memory holds, each turn asked for as soon as the one before is answered."""
    limits = SchedulerConfig(max_num_seqs=num_chats, max_num_batched_tokens=256, max_overtaken=max_overtaken)
    bench = Bench(180, scheduler=limits, max_model_len=320)
    history = {chat: list(tokens(f"chat{chat}", 40)) for chat in range(num_chats)}
    turns = dict.fromkeys(history, 0)
    order = []
    for chat in history:
        bench.engine.submit(request(f"{chat}-0", history[chat], 20))
    while any(turn < num_turns for turn in turns.values()):
        bench.engine.step()
        for chat, turn in turns.items():
            delta = bench.deltas.get(f"{chat}-{turn}")
            if turn < num_turns and delta is not None and delta.finish_reason:
                order.append(f"{chat}-{turn}")
                history[chat] += [*delta.token_ids, *tokens(f"{chat}/{turn}", 20)]
                turns[chat] += 1
                if turns[chat] < num_turns:
                    bench.engine.submit(request(f"{chat}-{turn + 1}", history[chat], 20))
    bench.run()
    bench.assert_idle()
    return bench, order


def test_turns_whose_kv_is_there_may_go_first() -> None:
    """Or each conversation's KV would be given up just before its next turn."""
    in_order, overtaking = _chat(0)[0], _chat(64)[0]
    assert computed(overtaking) < 0.8 * computed(in_order)


def test_the_arena_of_its_own_prompt_is_no_room_for_a_request() -> None:
    """Its idle tail could be lent, but the piece of a prompt as long as that computes there."""
    limits = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=512)
    bench = Bench(150, scheduler=limits, max_model_len=600)
    chat = list(tokens("chat", 479))
    run(bench, request("turn0", chat, 1))
    bench.engine.submit(request("running", tokens("running", 10), 60))
    bench.engine.step()
    bench.engine.submit(request("other", tokens("other", 300), 1))
    bench.engine.submit(request("turn1", [*chat, *bench.deltas["turn0"].token_ids, 5], 1))
    while "other" not in bench.deltas:
        bench.engine.step()
    assert "turn1" in bench.deltas
    assert cached(bench, "turn1") == 479
    bench.run()
    bench.assert_idle()


def test_nobody_is_overtaken_for_ever() -> None:
    """Once a request has been overtaken that often, it goes first, whatever it displaces."""
    bench = Bench(60, scheduler=SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=64, max_overtaken=3))
    chat = tokens("chat", 100)
    run(bench, request("turn0", chat, 4))
    bench.engine.submit(request("other", tokens("other", 150), 4))
    before = 0
    for turn in range(1, 12):
        bench.engine.submit(request(f"turn{turn}", [*chat, turn], 2))
        bench.engine.submit(request(f"also{turn}", [*chat, turn, 1], 2))
        while not bench.deltas.get(f"turn{turn}", None):
            bench.engine.step()
        before += "other" not in bench.deltas
    bench.run()
    assert bench.deltas["other"].finish_reason == "length"
    assert before < 8
    bench.assert_idle()


@pytest.mark.parametrize("mode", ["elastic", "virtual"])
@pytest.mark.parametrize("seed", range(6))
def test_random_conversations_in_tight_memory(mode: Mode, seed: int) -> None:
    """Every answer is its own, and every key and value read is what was written for it."""
    dice = random.Random(seed)
    limits = SchedulerConfig(
        max_num_seqs=dice.choice([2, 4, 8]), max_num_batched_tokens=dice.choice([24, 64])
    )
    config = MemoryConfig(mode=mode, map_ahead_tokens=dice.choice([0, 8, 40]))
    converse(Bench(dice.choice([44, 60, 90]), config, limits), seed)
