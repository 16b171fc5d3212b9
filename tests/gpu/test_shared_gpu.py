"""Two engines in two processes share one GPU: what one gives back the other gets, and nobody runs out."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from engine.config import MIB, EngineConfig, MemoryConfig, ModelSource, SchedulerConfig
from tests.bench.swinging_load import TINY_LLAMA

pytestmark = pytest.mark.gpu

PATIENCE_S = 180.0
SHAPE = TINY_LLAMA | {"num_hidden_layers": 8, "max_position_embeddings": 16384, "torch_dtype": "bfloat16"}


def _serve(config: EngineConfig, orders: Connection) -> None:
    """An engine's process: builds it, then does what it is told and says what became of it."""
    from engine.build import build_engine
    from engine.control import Order
    from engine.messages import GenerateRequest, SamplingParams

    ended: dict[str, str | None] = {}
    engine = build_engine(
        config,
        lambda deltas: ended.update({one.request_id: one.error for one in deltas if one.finish_reason}),
    )
    count = 0
    orders.send(engine.snapshot)
    while (order := orders.recv()) is not None:
        what, argument = order
        if what == "limit":
            count += 1
            answer = engine.apply(Order(1, count, 0, 0, pool_bytes=argument))
            engine.step()
            while engine.step():
                pass
            orders.send((answer.result(timeout=1), engine.snapshot))
        else:
            ended.clear()
            sampling = SamplingParams(max_tokens=64, ignore_eos=True)
            for index in range(argument):
                prompt = tuple((index * 31 + at * 7) % 1000 + 1 for at in range(4000))
                engine.submit(GenerateRequest(f"{count}-{index}", prompt, sampling))
            most = 0
            while engine.step():
                most = max(most, engine.snapshot.memory.created)
            orders.send((dict(ended), most, engine.snapshot))


class Process:
    """One engine, told over a pipe."""

    def __init__(self, config: EngineConfig) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(config, theirs), daemon=True)
        self._process.start()

    def wait(self) -> Any:
        assert self._ours.poll(PATIENCE_S), "it does not answer"
        return self._ours.recv()

    def tell(self, what: str, argument: int) -> Any:
        self._ours.send((what, argument))
        return self.wait()

    def end(self) -> None:
        if self._process.is_alive():
            self._ours.send(None)
            self._process.join(20)
        if self._process.is_alive():
            self._process.kill()


@contextmanager
def two_engines(folder: Path, share: float) -> Iterator[tuple[Process, Process]]:
    (folder / "config.json").write_text(json.dumps(SHAPE))
    config = EngineConfig(
        ModelSource("shared", str(folder), load_format="dummy"),
        MemoryConfig(device_share=share, margin_bytes=1024 * MIB, balloon_bytes=0),
        SchedulerConfig(max_num_seqs=512, max_num_batched_tokens=8192),
        device="cuda",
        max_model_len=8192,
        enforce_eager=True,
    )
    processes = Process(config), Process(config)  # both load at the same time
    try:
        yield processes
    finally:
        for one in processes:
            one.end()


def test_two_processes_lend_a_gpu_to_each_other(tmp_path: Path) -> None:
    """A twentieth of the GPU each, so that it is theirs also where somebody else uses the rest."""
    with two_engines(tmp_path, 0.05) as (first, second):
        starts = first.wait(), second.wait()
        assert starts[0].shared_device == starts[1].shared_device != ""
        own, chunk_bytes = starts[0].memory.configured, starts[0].memory.chunk_bytes
        joint = own + starts[1].memory.configured
        assert abs(own - starts[1].memory.configured) <= 0.1 * own, "no part depends on who came first"

        per_request = -(-4100 * 8 * 2 * 4 * 128 * 2 // chunk_bytes)
        crowd = min(500, 2 * own // per_request)  # twice what its own part holds
        ended, most, _ = first.tell("serve", crowd)
        assert set(ended.values()) == {None}
        assert most <= own

        least = own // 4
        started = time.monotonic()
        answer, snapshot = first.tell("limit", least * chunk_bytes)
        given_back_s = time.monotonic() - started
        assert answer.outcome == "applied"
        assert snapshot.memory.created <= least
        assert given_back_s < 5.0, "within seconds"

        answer, _ = second.tell("limit", (joint - least) * chunk_bytes)
        assert answer.outcome == "applied"
        ended, most, _ = second.tell("serve", crowd)
        assert set(ended.values()) == {None}
        assert own < most <= joint - least

        answer, snapshot = second.tell("limit", own * chunk_bytes)
        assert snapshot.memory.created <= own
        first.tell("limit", own * chunk_bytes)
        ended, most, _ = first.tell("serve", crowd)
        assert set(ended.values()) == {None}
        assert least < most <= own
