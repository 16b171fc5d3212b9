"""Parked requests that move from one engine to another: every answer is right, and every chunk accounted for.

The pattern model reads every key and value back before each step.
"""

from __future__ import annotations

import pytest

from engine.memory.kv_stream import KvStreams
from engine.messages import GenerateRequest
from tests.fakes import CHUNK_BYTES, Bench, answer
from tests.unit.migration_cases import (
    REQUESTS,
    crowded,
    move,
    said,
)

pytestmark = pytest.mark.usefixtures("steps_ahead")


def expect(requests: list[GenerateRequest], *benches: Bench) -> None:
    for request in requests:
        assert said(request, *benches) == answer(request.prompt_token_ids, request.sampling.max_tokens)
    for bench in benches:
        bench.assert_idle()
        assert bench.num_held == 0
        assert not bench.engine._open


@pytest.mark.parametrize("shares_memory", [True, False])
def test_a_request_goes_on_in_another_engine(shares_memory: bool) -> None:
    transport = KvStreams("127.0.0.1", CHUNK_BYTES, shares_memory)
    source, target = crowded(transport=transport), crowded(transport=transport)
    for request in REQUESTS:
        source.engine.submit(request)
    name = move(source, target)
    assert name not in [seq.request_id for seq in source.scheduler.unfinished()]
    before = len(source.deltas[name].token_ids)
    source.run()
    target.run()
    assert len(source.deltas[name].token_ids) == before > 0
    assert source.deltas[name].finish_reason is None
    assert target.deltas[name].finish_reason == "length"
    assert target.scheduler.num_preemptions == 0, "nothing was computed again"
    expect(REQUESTS, source, target)
