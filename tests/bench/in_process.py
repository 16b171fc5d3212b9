"""Engines in this process, driven step by step on the clock: no HTTP, no other process, the engine alone.

A request counts from the moment it is due, whether or not a step was just running. Both engines get the
same token ids, sample greedily and ignore the end of sequence.
"""

from __future__ import annotations

import gc
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from cluster.bench.summary import Record
from cluster.bench.workload import Workload
from engine.config import EngineConfig
from engine.messages import GenerateRequest, SamplingParams, TokenDelta

_IDLE_STEPS = 10_000  # an engine that did nothing that often has lost a request


class Gain(NamedTuple):
    """Tokens that one request gained at one time."""

    request_id: str
    num_tokens: int
    finished: bool
    error: str | None
    time_s: float


class Stepper(Protocol):
    """An engine that computes only while `step` runs."""

    def submit(self, request_id: str, prompt: list[int], output_tokens: int) -> None:
        """Queue a request."""

    def step(self) -> bool:
        """One step; False if there was nothing to do."""

    def gains(self) -> list[Gain]:
        """What requests gained since the last call."""


class BallonetStepper:
    """This repository's engine.

    Args:
        clock: the one that the driver uses.
    """

    def __init__(self, config: EngineConfig, clock: Callable[[], float] = time.perf_counter) -> None:
        from engine.build import build_engine

        self._clock = clock
        self._gains: list[Gain] = []
        self.engine = build_engine(config, self._publish)
        gc.collect()
        gc.freeze()  # as the engine's actor does, and as vLLM does by itself

    def submit(self, request_id: str, prompt: list[int], output_tokens: int) -> None:
        sampling = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
        self.engine.submit(GenerateRequest(request_id, tuple(prompt), sampling))

    def step(self) -> bool:
        return self.engine.step()

    def gains(self) -> list[Gain]:
        gains, self._gains = self._gains, []
        return gains

    def _publish(self, deltas: Sequence[TokenDelta]) -> None:
        now = self._clock()
        for delta in deltas:
            error = delta.error or "cancelled" if delta.finish_reason in ("error", "cancelled") else None
            finished = delta.finish_reason is not None
            self._gains.append(Gain(delta.request_id, len(delta.token_ids), finished, error, now))


class VllmStepper:
    """vLLM (0.26.0) in this process, with its defaults.

    Args:
        model: a directory with a `config.json`; weights are random.
        kv_gib: memory of the KV cache, its activations not counted; None is what 0.90 of the card leaves.
    """

    def __init__(
        self, model: Path, kv_gib: float | None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        # Read when vLLM is imported: the engine core in this process, and no sampler that compiles CUDA
        # code, which a host may be unable to.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
        from vllm import LLM  # type: ignore[import-not-found]

        memory: dict[str, Any] = {"gpu_memory_utilization": 0.90}
        if kv_gib is not None:
            memory["kv_cache_memory_bytes"] = int(kv_gib * 2**30)
        self._clock = clock
        self._gains: list[Gain] = []
        self._engine = LLM(
            model=str(model), load_format="dummy", skip_tokenizer_init=True, **memory
        ).llm_engine

    def submit(self, request_id: str, prompt: list[int], output_tokens: int) -> None:
        from vllm import SamplingParams as VllmSamplingParams
        from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]

        params = VllmSamplingParams(
            max_tokens=output_tokens,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._engine.add_request(request_id, {"prompt_token_ids": prompt}, params)

    def step(self) -> bool:
        if not self._engine.has_unfinished_requests():
            return False
        outputs = self._engine.step()
        now = self._clock()
        for output in outputs:
            tokens = sum(len(part.token_ids) for part in output.outputs)
            reasons = {part.finish_reason for part in output.outputs if part.finish_reason}
            error = None if reasons <= {"length", "stop"} else f"finished with {sorted(reasons)}"
            self._gains.append(Gain(output.request_id, tokens, output.finished, error, now))
        return True

    def gains(self) -> list[Gain]:
        gains, self._gains = self._gains, []
        return gains


def drive(
    engine: Stepper,
    workload: Workload,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[list[Record], float]:
    """Run a workload to its end: a record of each request, and the seconds it took.

    Raises:
        RuntimeError: the engine has stopped although requests are open.
    """
    prompts = [workload.token_ids(request) for request in workload.requests]
    records = [Record(request.arrival_s, request.prompt_tokens) for request in workload.requests]
    due = deque(range(len(records)))
    num_open = idle = 0
    origin = clock()
    while due or num_open:
        while due and records[due[0]].start_s <= clock() - origin:
            index = due.popleft()
            engine.submit(str(index), prompts[index], workload.requests[index].output_tokens)
            num_open += 1
        busy = engine.step()
        for gain in engine.gains():
            _note(records[int(gain.request_id)], gain, origin)
            num_open -= gain.finished
        idle = 0 if busy or not num_open else idle + 1
        if idle > _IDLE_STEPS:
            raise RuntimeError(f"the engine does nothing although {num_open} requests are open")
        if not num_open and due:
            sleep(max(0.0, records[due[0]].start_s - (clock() - origin)))
    return records, clock() - origin


def _note(record: Record, gain: Gain, origin: float) -> None:
    now_s = gain.time_s - origin
    if gain.num_tokens:
        record.delta_times_s.append(now_s)
        record.output_tokens += gain.num_tokens
        record.end_s = now_s
    if gain.finished:
        record.finished = True
        record.error = gain.error
        if gain.error is None and not record.delta_times_s:
            record.error = "finished without a token"
