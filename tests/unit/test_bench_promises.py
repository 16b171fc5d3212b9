"""How soon first and second tokens came, who got what was promised, and what an engine keeps up with."""

from __future__ import annotations

import pytest

from cluster.bench.summary import Record
from cluster.bench.workload import Workload
from tests.bench.in_process import Driven
from tests.bench.promises import figures_of, rates, summary_of, table

OBJECTIVES = {"ttft": 1000.0, "tpot": 500.0}


def _record(start_s: float, *times_s: float, error: str | None = None, prompt_tokens: int = 4) -> Record:
    times = [start_s + time_s for time_s in times_s]
    return Record(
        start_s, prompt_tokens, times, times[-1], len(times), finished=True, error=error, token_ids=[]
    )


def _driven(*records: Record, **memory: float) -> Driven:
    steps = {"steps": {}, "memory": memory} if memory else {"steps": {}}
    return Driven(Workload("w", (), 0), list(records), 10.0, steps)


RUN = _driven(
    _record(0.0, 0.5, 1.0, 1.5),  # within both
    _record(1.0, 0.5, 3.5, 3.5),  # tokens too slow
    _record(2.0, 1.5, 1.6, 1.7),  # first one too late
    _record(3.0, 1.0, 1.5, error="it broke"),
)


def test_a_promise_is_kept_in_full_or_not_at_all() -> None:
    figures = figures_of(RUN, summary_of(RUN, OBJECTIVES))
    assert figures["slo_attainment"] == {"ttft": 0.5, "tpot": 0.5, "all": 0.25}
    assert figures["request_goodput"] == 0.1
    assert (figures["p50_ttst_ms"], figures["max_ttst_ms"]) == (1600.0, 3500.0)
    assert (figures["p50_gap_ms"], figures["max_gap_ms"]) == (500.0, 3000.0)


def test_an_engine_that_keeps_up_completes_what_is_offered() -> None:
    assert rates([_record(float(at), 1.0, 4.0) for at in range(11)]) == {
        "offered_rps": 1.0,
        "completed_rps": 1.0,
    }


def test_what_is_late_in_the_end_was_too_much() -> None:
    records = [_record(float(at), 1.0, 4.0 + at) for at in range(11)]  # each takes a second more
    assert rates(records) == {"offered_rps": 1.0, "completed_rps": 0.5}


def test_an_engine_that_lets_the_first_wait_for_the_last_is_judged_alike() -> None:
    """Taking turns ends many at once: what counts is when all are done, and what one takes at least."""
    together = [_record(float(at), 1.0, 24.0 - at) for at in range(10)]
    assert rates([*together, _record(10.0, 1.0, 4.0)])["completed_rps"] == 0.5


@pytest.mark.parametrize(
    "records",
    [
        [_record(0.0, 1.0), _record(0.0, 2.0)],  # all at once
        [_record(0.0, 1.0), _record(1.0, 1.0, prompt_tokens=5)],  # of two sizes
        [_record(0.0, 1.0), _record(1.0, 1.0, error="it broke")],
    ],
    ids=["at once", "sizes", "failed"],
)
def test_other_loads_have_no_such_rates(records: list[Record]) -> None:
    assert rates(records) == {}


def test_a_row_tells_a_rival_by_what_it_has() -> None:
    run = _driven(*RUN.records, parkings=7, copied_out_gib=1.25, copied_in_gib=20.0)
    rows = [
        (name, figures_of(one, summary_of(one, OBJECTIVES))) for name, one in (("slo", run), ("vllm", RUN))
    ]
    head, ours, rivals = table([("w", name, figures) for name, figures in rows]).splitlines()
    assert ours.endswith("7    1.2/20.0")
    for title, value in (
        ("in SLO", "25%"),
        ("2nd token p50/max s", "1.60/3.50"),
        ("TTFT p50/p99 s", "0.50/1.48"),
    ):
        end = head.index(title) + len(title)
        assert ours[:end].endswith(f" {value}")
        assert rivals[:end].endswith(f" {value}")
