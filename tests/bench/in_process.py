"""Engines in this process, driven step by step on the clock: no HTTP, no other process, the engine alone.

A request counts from the moment it is due, whether or not a step was just running; a later turn of a
session is due when the answer before it has ended, and goes on from the tokens of that answer. Both engines
get the same token ids, sample greedily and ignore the end of sequence.
"""

from __future__ import annotations

import gc
import heapq
import math
import os
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cluster.bench.summary import Record
from cluster.bench.workload import Workload
from engine.config import EngineConfig
from engine.messages import EngineSnapshot, GenerateRequest, SamplingParams, TokenDelta
from tests.bench.engine_options import EngineOptions
from tests.bench.step_watch import Gain, StepWatch

if TYPE_CHECKING:
    from engine.core import Engine  # brings torch in

_IDLE_STEPS = 10_000  # an engine that did nothing that often has lost a request
_LOOK_S = 0.01  # between two looks at a balloon that grows
_REFUSED_S = 20.0  # without growth: a slab is pinned in a fraction of a second, a refusal lasts 30


class Stepper(Protocol):
    """An engine that computes only while `step` runs."""

    def submit(self, request_id: str, prompt: list[int], output_tokens: int) -> None:
        """Queue a request."""

    def step(self) -> bool:
        """One step; False if there was nothing to do."""

    def gains(self) -> list[Gain]:
        """What requests gained since the last call."""

    @property
    def num_running(self) -> int:
        """Sequences that hold KV."""

    @property
    def snapshot(self) -> EngineSnapshot | None:
        """Of our engine; None of a rival."""

    @property
    def steps_ahead(self) -> int:
        """Steps launched before one has been read; of our engine."""


class EngineStepper:
    """Our engine, wherever its parts come from. Implements `Stepper` once `engine` is there.

    Args:
        clock: the one that the driver uses.
    """

    engine: Engine

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._gains: list[Gain] = []

    def submit(self, request_id: str, prompt: list[int], output_tokens: int) -> None:
        sampling = SamplingParams(max_tokens=output_tokens, temperature=0.0, ignore_eos=True)
        self.engine.submit(GenerateRequest(request_id, tuple(prompt), sampling))

    def step(self) -> bool:
        return self.engine.step()

    def gains(self) -> list[Gain]:
        gains, self._gains = self._gains, []
        return gains

    @property
    def num_running(self) -> int:
        return self.engine.snapshot.num_running

    @property
    def snapshot(self) -> EngineSnapshot:
        return self.engine.snapshot

    @property
    def steps_ahead(self) -> int:
        return self.engine.steps_ahead

    def publish(self, deltas: Sequence[TokenDelta]) -> None:
        """What the engine is to publish to."""
        now = self._clock()
        for delta in deltas:
            error = delta.error or "cancelled" if delta.finish_reason in ("error", "cancelled") else None
            finished = delta.finish_reason is not None
            self._gains.append(
                Gain(delta.request_id, delta.token_ids, finished, error, now, delta.num_cached_tokens)
            )


class BallonetStepper(EngineStepper):
    """This repository's engine as it is served.

    Args:
        clock: the one that the driver uses.
    """

    def __init__(self, config: EngineConfig, clock: Callable[[], float] = time.perf_counter) -> None:
        from engine.build import build_engine

        super().__init__(clock)
        self.engine = build_engine(config, self.publish)
        gc.collect()
        gc.freeze()  # as the engine's actor does, and as vLLM does by itself


class VllmStepper:
    """vLLM (0.26.0) in this process, with its defaults where `options` say nothing.

    Args:
        model: a directory with a `config.json`; weights are random.
        options: without `kv_gib` the KV cache is what 0.90 of the card leaves, its activations not counted.
    """

    def __init__(
        self, model: Path, options: EngineOptions, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        # Read when vLLM is imported: the engine core in this process, and no sampler that compiles CUDA
        # code, which a host may be unable to.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
        from vllm import LLM  # type: ignore[import-not-found]

        settings: dict[str, Any] = {"gpu_memory_utilization": 0.90} | options.vllm_arguments()
        self._clock = clock
        self._gains: list[Gain] = []
        self._engine = LLM(
            model=str(model), load_format="dummy", skip_tokenizer_init=True, **settings
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
            tokens = tuple(token for part in output.outputs for token in part.token_ids)
            reasons = {part.finish_reason for part in output.outputs if part.finish_reason}
            error = None if reasons <= {"length", "stop"} else f"finished with {sorted(reasons)}"
            cached = output.num_cached_tokens or 0
            self._gains.append(Gain(output.request_id, tokens, output.finished, error, now, cached))
        return True

    def gains(self) -> list[Gain]:
        gains, self._gains = self._gains, []
        return gains

    @property
    def num_running(self) -> int:
        # The engine core is in this process; its scheduler counts (running, waiting).
        return int(self._engine.engine_core.engine_core.scheduler.get_request_counts()[0])

    @property
    def snapshot(self) -> None:
        return None

    steps_ahead = 0


@dataclass(frozen=True, slots=True)
class Filled:
    """A balloon that has been waited for.

    Attributes:
        gib, wanted_gib: of host memory that is there, and that there should be.
        wait_s: how long it was waited for.
    """

    gib: float
    wanted_gib: float
    wait_s: float

    def __str__(self) -> str:
        is_there = self.gib >= self.wanted_gib - 0.1  # whole chunks
        short = "" if is_there else f" of {self.wanted_gib:.1f}, and grows no further"
        return f"a balloon of {self.gib:.1f} GiB{short}, waited for {self.wait_s:.1f} s"


def wait_for_balloon(
    engine: Stepper,
    wanted_gib: float,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Filled | None:
    """Let an idle engine fill its balloon in the background until it is there, or grows no further.

    None if there is none: of a rival, or of an engine that has it switched off. How much of it the policy
    would use just now (`balloon_logical`) does not matter.
    """
    started = grown_s = clock()
    largest = 0
    while engine.snapshot is not None and engine.snapshot.memory.balloon_logical:
        memory = engine.snapshot.memory
        gib = memory.chunk_bytes / 2**30
        if memory.balloon_physical > largest:
            largest, grown_s = memory.balloon_physical, clock()
        if largest >= int(wanted_gib / gib) or clock() - grown_s > _REFUSED_S:
            return Filled(largest * gib, wanted_gib, clock() - started)
        engine.step()  # takes in the slabs that are made, and has more made
        sleep(_LOOK_S)
    return None


@dataclass(frozen=True, slots=True)
class Driven:
    """A run that has ended.

    Attributes:
        workload: the requests that were submitted, or given up because the turn before them failed.
        records: one for each of them.
        steps: what the steps did, as `StepWatch.figures` names it.
    """

    workload: Workload
    records: list[Record]
    duration_s: float
    steps: dict[str, Any]


def drive(
    engine: Stepper,
    workload: Workload,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    submit_for_s: float = math.inf,
) -> Driven:
    """Run a workload to its end.

    Args:
        submit_for_s: seconds after which nothing is submitted any more.

    Raises:
        RuntimeError: the engine has stopped although requests are open.
    """
    load = Load(workload, submit_for_s)
    idle = 0
    origin = clock()
    watch = StepWatch(origin, engine.snapshot, engine.steps_ahead)
    while load.due or load.num_open:
        for name, prompt, output_tokens in load.take(clock() - origin):
            engine.submit(name, prompt, output_tokens)
        busy = engine.step()
        gains = engine.gains()
        watch.stepped(clock(), gains, engine.num_running, engine.snapshot)
        for gain in gains:
            load.note(gain, origin)
        idle = 0 if busy or not load.num_open else idle + 1
        if idle > _IDLE_STEPS:
            raise RuntimeError(f"the engine does nothing although {load.num_open} requests are open")
        if not load.num_open and load.due:
            sleep(max(0.0, load.due[0][0] - (clock() - origin)))
            watch.slept(clock())
    return load.driven(clock() - origin, watch)


class Load:
    """Which requests are due, and what became of them.

    Attributes:
        due: (seconds from the start, place in the workload), the earliest first.
        num_open: requests that are submitted and have not ended.
    """

    def __init__(self, workload: Workload, submit_for_s: float) -> None:
        self._workload, self._submit_for_s = workload, submit_for_s
        # Four bytes a token: lists of all prompts of a long load would take gigabytes.
        self._prompts = {
            place: array("I", workload.token_ids(request)) for place, request in enumerate(workload.requests)
        }
        self._followers = workload.followers()
        self._records: dict[int, Record] = {}
        self.num_open = 0
        self.due: list[tuple[float, int]] = []
        for place, request in enumerate(workload.requests):
            if request.follows is None:
                self._plan(place, request.arrival_s)

    def take(self, now_s: float) -> list[tuple[str, list[int], int]]:
        """(name, prompt, tokens to generate) of all that is due now."""
        taken = []
        while self.due and self.due[0][0] <= now_s:
            due_s, place = heapq.heappop(self.due)
            prompt = self._prompts[place] if place in self._followers else self._prompts.pop(place)
            self._records[place] = Record(due_s, len(prompt))
            taken.append((str(place), prompt.tolist(), self._workload.requests[place].output_tokens))
        self.num_open += len(taken)
        return taken

    def note(self, gain: Gain, origin: float) -> None:
        """What a request gained goes into its record; its end makes the next turn due."""
        place, now_s = int(gain.request_id), gain.time_s - origin
        record = self._records[place]
        if gain.token_ids:
            record.delta_times_s.append(now_s)
            record.output_tokens += gain.num_tokens
            record.token_ids += gain.token_ids
            record.end_s = now_s
        if gain.finished:
            self.num_open -= 1
            self._end(place, record, gain, now_s)

    def driven(self, duration_s: float, watch: StepWatch) -> Driven:
        """All that was submitted, with its records."""
        places = sorted(self._records)
        return Driven(
            self._workload.only(places),
            [self._records[place] for place in places],
            duration_s,
            watch.figures(),
        )

    def _plan(self, place: int, due_s: float) -> None:
        if due_s < self._submit_for_s:
            heapq.heappush(self.due, (due_s, place))

    def _end(self, place: int, record: Record, gain: Gain, now_s: float) -> None:
        record.finished, record.error = True, gain.error
        record.cached_tokens = gain.num_cached_tokens
        if gain.error is None and not record.delta_times_s:
            record.error = "finished without a token"
        said = array("I", record.token_ids)
        prompt = self._prompts.pop(place, array("I"))
        for follower in self._followers.get(place, ()):
            if record.error is not None:
                self._give_up(follower, now_s, f"not sent, for the turn before it failed: {record.error}")
                continue
            self._prompts[follower] = prompt + said + self._prompts[follower]
            self._plan(follower, now_s + self._workload.requests[follower].think_s)

    def _give_up(self, place: int, now_s: float, error: str) -> None:
        """A turn that cannot be sent has failed, and all behind it."""
        tokens = self._workload.requests[place].prompt_tokens
        self._records[place] = Record(now_s, tokens, end_s=now_s, finished=True, error=error)
        for follower in self._followers.get(place, ()):
            self._give_up(follower, now_s, error)
