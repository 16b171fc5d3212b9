"""Turns come to an end: whatever cannot be parked, or cannot come back, goes on in another way."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from engine.config import MemoryConfig, SchedulerConfig
from engine.messages import GenerateRequest, SamplingParams
from tests.fakes import Bench, HeldCopies
from tests.unit.engine_cases import ask, finish, tokens
from tests.unit.parking_cases import OUT, filled

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("total", [36, 44, 50, 60, 70, 80])
def test_pairs_that_share_their_beginning_all_finish(total: int) -> None:
    """Beginnings that only parked sequences share stay on the device; they may fill all of it."""
    limits = SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=64)
    bench = Bench(total, MemoryConfig(), limits, balloon_chunks=2000)
    sampling = SamplingParams(max_tokens=80, ignore_eos=True)
    requests = [
        GenerateRequest(f"{pair}-{one}", (*tokens(f"stem{pair}", 96), *tokens(f"{pair}-{one}", 10)), sampling)
        for pair in range(8)
        for one in range(2)
    ]
    for request in requests:
        bench.engine.submit(request)
        for _ in range(3):
            bench.engine.step()
    bench.run(3000)
    finish(bench, requests)


def test_a_link_that_always_fails_ends_nothing() -> None:
    copies = HeldCopies()
    limits = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64, turn_tokens=4, min_retained_chunks=0)
    bench = Bench(46, MemoryConfig(map_ahead_tokens=0), limits, balloon_chunks=400, copies=copies)
    filled(bench.balloon)
    copies.fails = lambda ticket: ticket.direction is OUT
    requests = [replace(ask(f"r{at}", 20 + 7 * at, 90), tpot_slo_s=0.01) for at in range(4)]
    for request in requests:
        bench.engine.submit(request)
    bench.run(3000)
    finish(bench, requests)


_DROPPED = """
import gc, threading, faulthandler
from tests.unit.parking_cases import Yard
faulthandler.dump_traceback_later(20, exit=True)
yard = Yard()
gc.disable()
del yard
# As in a thread that is just starting or ending when the collector runs (Python up to 3.12).
with getattr(threading, "_shutdown_locks_lock", threading.Lock()):
    gc.collect()
"""


def test_a_pool_may_be_collected_wherever_the_collector_happens_to_run() -> None:
    """A finalizer that joins a thread waits for itself in one that starts: seen at the end of tests."""
    command = [sys.executable, "-c", _DROPPED]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-1500:]
