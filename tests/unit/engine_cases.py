"""Requests of the pattern model, and what it answers to them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from engine.messages import GenerateRequest, SamplingParams
from tests.fakes import VOCAB, Bench, answer


def ask(name: str, prompt_len: int, max_tokens: int, **sampling: object) -> GenerateRequest:
    prompt = tuple(random.Random(name).choices(range(1, VOCAB), k=prompt_len))
    return GenerateRequest(name, prompt, SamplingParams(max_tokens=max_tokens, **sampling))  # type: ignore[arg-type]


def expect(bench: Bench, request: GenerateRequest) -> None:
    delta = bench.deltas[request.request_id]
    assert delta.token_ids == answer(request.prompt_token_ids, request.sampling.max_tokens)
    assert delta.finish_reason == "length"


def serve(bench: Bench, requests: Sequence[GenerateRequest]) -> None:
    """All at once, to the end: each has its own answer, and nothing is left."""
    for request in requests:
        bench.engine.submit(request)
    bench.run()
    for request in requests:
        expect(bench, request)
    bench.assert_idle()
