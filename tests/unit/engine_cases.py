"""Requests of the pattern model, and what it answers to them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from engine.messages import GenerateRequest, SamplingParams
from tests.fakes import VOCAB, Bench, answer


def tokens(name: str, count: int) -> tuple[int, ...]:
    """Random tokens, the same for the same name."""
    return tuple(random.Random(name).choices(range(1, VOCAB), k=count))


def ask(name: str, prompt_len: int, max_tokens: int, **sampling: object) -> GenerateRequest:
    return GenerateRequest(name, tokens(name, prompt_len), SamplingParams(max_tokens=max_tokens, **sampling))  # type: ignore[arg-type]


def request(name: str, prompt: Sequence[int], max_tokens: int = 5, salt: str = "") -> GenerateRequest:
    """These very tokens."""
    return GenerateRequest(name, tuple(prompt), SamplingParams(max_tokens=max_tokens), salt)


def computed(bench: Bench) -> int:
    """Tokens computed since the last call."""
    count = sum(plan.num_tokens for plan in bench.runner.plans)
    bench.runner.plans.clear()
    return count


def expect(bench: Bench, request: GenerateRequest) -> None:
    delta = bench.deltas[request.request_id]
    assert delta.token_ids == answer(request.prompt_token_ids, request.sampling.max_tokens)
    assert delta.finish_reason == "length"


def serve(bench: Bench, requests: Sequence[GenerateRequest]) -> None:
    """All at once, to the end: each has its own answer, and nothing is left."""
    for request in requests:
        bench.engine.submit(request)
    finish(bench, requests)


def finish(bench: Bench, requests: Sequence[GenerateRequest]) -> None:
    """What was submitted runs to the end: each has its own answer, and nothing is left."""
    bench.run()
    for request in requests:
        expect(bench, request)
    bench.assert_idle()


class Talk:
    """Trees of conversations: prompts that go on where others ended, or part from them on the way."""

    def __init__(self, seed: int, longest: int = 180, max_tokens: int = 50) -> None:
        self.dice = random.Random(f"{seed}/talk")
        self._seed, self._longest, self._max_tokens = seed, longest, max_tokens
        lengths = [longest // 18, longest // 3 + 4, longest // 3 + 10]
        self._known = [tokens(f"{seed}/system{length}", length) for length in lengths]
        self._count = 0

    def next(self) -> GenerateRequest:
        """A request."""
        self._count += 1
        base, fresh = self.dice.choice(self._known), tokens(f"{self._seed}/{self._count}", 40)
        kept = self.dice.choice([len(base), self.dice.randint(1, len(base))])
        prompt = (*base[:kept], *fresh[: self.dice.randint(1, 40)])[: self._longest]
        sampling = SamplingParams(max_tokens=self.dice.randint(1, self._max_tokens))
        return GenerateRequest(f"{self._seed}-{self._count}", prompt, sampling)

    def ended(self, conversation: Sequence[int]) -> None:
        """Later requests may go on from here."""
        self._known = [*self._known[-11:], tuple(conversation)]


def converse(bench: Bench, seed: int, turns: int = 120, talk: Talk | None = None) -> None:
    """Conversations with cancels and trims in between, to the end: every answer is its own, none is lost."""
    talk = talk or Talk(seed)
    dice, open_, asked, cancelled = talk.dice, {}, {}, set()
    for _ in range(turns):
        for request in [talk.next() for _ in range(dice.randrange(3))]:
            open_[request.request_id] = asked[request.request_id] = request
            bench.engine.submit(request)
        for _ in range(dice.randrange(4)):
            bench.engine.step()
        if dice.random() < 0.1 and open_:
            cancelled.add(dice.choice(sorted(open_)))
            bench.engine.cancel(max(cancelled))
        if dice.random() < 0.05:
            bench.engine.trim(drop_cache=dice.random() < 0.5)
        bench.pool.check()
        for name in [name for name in open_ if name in bench.deltas and bench.deltas[name].finish_reason]:
            talk.ended((*open_.pop(name).prompt_token_ids, *bench.deltas[name].token_ids))
    bench.run()
    bench.assert_idle()
    for name, request in asked.items():
        delta = bench.deltas[name]
        assert delta.finish_reason == "length" or (delta.finish_reason == "cancelled" and name in cancelled)
        full = answer(request.prompt_token_ids, request.sampling.max_tokens)
        assert delta.token_ids == full[: len(delta.token_ids)]
        assert len(delta.token_ids) == len(full) or delta.finish_reason == "cancelled"
    assert bench.engine.snapshot.prefix_hits > 0
