"""Overload: a request that could not be in time is refused at once, with the time to come back."""

from __future__ import annotations

import pytest

from engine.config import MemoryConfig, SchedulerConfig
from engine.errors import OverloadedError
from engine.messages import GenerateRequest, SamplingParams
from tests.fakes import Bench


def _bench(on_overload: str) -> Bench:
    limits = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64, on_overload=on_overload)  # type: ignore[arg-type]
    return Bench(200, MemoryConfig(enable_prefix_caching=False), limits)


def _submit(bench: Bench, name: str, ttft_slo_s: float = 0.02) -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    bench.engine.submit(GenerateRequest(name, (7,) * 200, params, ttft_slo_s=ttft_slo_s))


def _loaded(on_overload: str) -> Bench:
    """Busy until its rate is known: the fake clock passes a millisecond a look."""
    bench, count = _bench(on_overload), 0
    while not bench.engine.snapshot.expected_ttft_s:
        while bench.engine.snapshot.num_waiting < 4:
            _submit(bench, f"load{count}", ttft_slo_s=1e6)
            count += 1
            bench.engine.step()
        bench.engine.step()
    return bench


def test_what_could_not_be_in_time_is_refused_with_an_honest_time() -> None:
    bench = _loaded("shed")
    with pytest.raises(OverloadedError) as refused:
        _submit(bench, "late")
    assert dict(bench.engine.snapshot.decisions).get("shed", 0) == 0  # a snapshot is a step's
    expected_s = refused.value.retry_after_s + 0.02
    assert expected_s > 0.02
    told_s = bench.engine._clock()
    _submit(bench, "patient", ttft_slo_s=1e6)
    while "patient" not in bench.deltas:
        bench.engine.step()
    assert bench.engine._clock() - told_s == pytest.approx(expected_s, rel=0.5)
    assert dict(bench.engine.snapshot.decisions)["shed"] == 1


def test_the_same_request_comes_through_after_that_time() -> None:
    bench = _loaded("shed")
    with pytest.raises(OverloadedError) as refused:
        _submit(bench, "late")
    due_s = bench.engine._clock() + refused.value.retry_after_s
    while bench.engine._clock() < due_s and bench.engine.step():
        pass
    _submit(bench, "late", ttft_slo_s=1.0)
    bench.run()
    assert bench.deltas["late"].finish_reason == "length"


def test_a_queue_takes_everything() -> None:
    bench = _loaded("queue")
    _submit(bench, "late")
    bench.run()
    assert bench.deltas["late"].finish_reason == "length"
