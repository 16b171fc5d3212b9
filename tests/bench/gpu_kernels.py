"""Attention kernels, ours and the rivals', beside the card's ceilings: `python -m tests.bench.gpu_kernels`.

Every kernel of a case computes the same problem, and its result is compared with ours before its time
counts. Each is captured in a CUDA graph of several calls; rounds go over all of them in turn, so that
clocks and temperature hurt all alike; medians are reported. A rival that cannot be imported or run keeps
its line, with the reason. Shares are of an H100's ceilings: 3.35 TB/s by its data sheet, 798 TFLOP/s as
measured for a bf16 matrix product. A prefix that all sequences share counts once in them, which a kernel that
reads it for each sequence cannot reach. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from cluster.bench.floor import CEILINGS
from tests.bench.attention_cases import Case, Problem
from tests.bench.attention_kernels import RIVALS, Builder, Launch, ours
from tests.bench.machine import machine

DECODES = [(256, 1024), (64, 8192), (16, 32768), (4, 131072), (1, 131072), (8, 4096), (1, 1024)]
# Beside each other: every sequence with a context of its own, and all of them behind one prompt of 4k tokens.
SHARING_DECODES = [Problem(256, 1, 4223), Problem(256, 1, 4223, shared=4096)]
PREFILLS = [
    (1, 4096, 0),
    (1, 16384, 0),
    (1, 65536, 0),
    (8, 2048, 14336),
    (8, 2048, 16384),
    (1, 512, 16384),
    (16, 64, 4096),
]
OURS = "ballonet"
_REPLAY_MS = 2.0  # of calls in one graph: long against the events that time it
_MOST_CALLS, _MOST_ROUNDS, _LEAST_ROUNDS = 50, 25, 3
_LARGEST_ERROR = 0.02  # relative, root mean square; roundings of bf16 give 0.005


@dataclass(slots=True)
class Timing:
    """One kernel on one case. `ms` is None where it did not run, and `note` says why."""

    ms: float | None = None
    error: float = 0.0
    note: str = ""


def problems(kinds: str) -> list[Problem]:
    """The cases of `decode`, `prefill` or `all`."""
    decodes = [Problem(batch, 1, context - 1) for batch, context in DECODES] + SHARING_DECODES
    prefills = [Problem(*shape) for shape in PREFILLS]
    return {"decode": decodes, "prefill": prefills, "all": decodes + prefills}[kinds]


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference over that of `expected`; NaN anywhere gives NaN."""
    difference = (result.float() - expected.float()).square().mean()
    return float((difference / expected.float().square().mean()).sqrt())


def prepare(
    case: Case, rivals: Mapping[str, Builder]
) -> tuple[dict[str, Launch], dict[str, Timing], torch.Tensor]:
    """Launches that agree, a Timing for each name with why it has none, and the result they agree on."""
    launches: dict[str, Launch] = {OURS: ours(case)}
    timings = {OURS: Timing()}
    expected = launches[OURS]().clone()
    for name, build in rivals.items():
        timings[name] = Timing()
        try:
            launch = build(case)
            timings[name].error = error = relative_error(launch(), expected)
        except Exception as failure:  # a rival may lack anything: its line says what
            timings[name].note = f"{type(failure).__name__}: {failure}".splitlines()[0][:150]
            continue
        if error <= _LARGEST_ERROR:
            launches[name] = launch
        else:
            timings[name].note = f"differs from ours by {error:.3g}: not timed"
    return launches, timings, expected


def time_case(case: Case, rivals: Mapping[str, Builder], seconds: float) -> dict[str, Timing]:
    """Median milliseconds of a call for each kernel, about `seconds` for all of them."""
    launches, timings, expected = prepare(case, rivals)
    calls: dict[str, int] = {}
    replays: dict[str, Callable[[], Any]] = {}
    once_ms: dict[str, float] = {}
    for name, launch in launches.items():
        _elapsed_ms(launch)
        once_ms[name] = max(1e-3, min(_elapsed_ms(launch) for _ in range(2)))
        calls[name] = max(1, min(_MOST_CALLS, int(_REPLAY_MS / once_ms[name])))
        replays[name], timings[name].note = _captured(launch, calls[name])
    round_ms = sum(max(_REPLAY_MS, once_ms[name]) for name in launches)
    rounds = max(_LEAST_ROUNDS, min(_MOST_ROUNDS, int(seconds * 1e3 / round_ms)))
    samples: dict[str, list[float]] = {name: [] for name in launches}
    for _ in range(rounds):
        for name, replay in replays.items():
            samples[name].append(_elapsed_ms(replay) / calls[name])
    for name, values in samples.items():
        timing = timings[name]
        timing.ms = statistics.median(values)
        # Again: what a kernel leaves behind (a counter, a workspace) may spoil its later runs.
        timing.error = relative_error(launches[name](), expected)
        if not timing.error <= _LARGEST_ERROR:
            timing.note += f" WRONG after many runs: differs by {timing.error:.3g}"
    return timings


def _captured(launch: Launch, count: int) -> tuple[Callable[[], Any], str]:
    """`count` calls as one CUDA graph; launched one by one, with a note, where that is refused."""

    def eager() -> None:
        for _ in range(count):
            launch()

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    try:
        with torch.cuda.stream(stream):
            launch()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            eager()
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError as error:
        return eager, f"no CUDA graph: {str(error).splitlines()[0][:100]}"
    return graph.replay, ""


def _elapsed_ms(work: Callable[[], Any]) -> float:
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def rate(problem: Problem, ms: float) -> tuple[float, float, str]:
    """Rate of a call, its share of the ceiling, and the unit: bytes for decodes, FLOPs for prefills."""
    share = floor_ms(problem) / ms
    if problem.is_decode:
        return problem.kv_bytes / ms / 1e9, share, "TB/s"
    return problem.flop / ms / 1e9, share, "TFLOP/s"


def floor_ms(problem: Problem) -> float:
    """The least a call can take: its bytes for a decode, its FLOPs for a prefill, at the ceiling."""
    ceiling = CEILINGS["h100"]
    if problem.is_decode:
        return problem.kv_bytes / ceiling.bytes_per_s * 1e3
    return problem.flop / ceiling.flop_per_s * 1e3


def lines(problem: Problem, timings: Mapping[str, Timing]) -> list[str]:
    """The table's lines of one case; `ours` is how much faster ours is."""
    text = []
    our_ms = timings[OURS].ms
    for name, timing in timings.items():
        start = f"{problem.name if name == OURS else '':32} {name:14}"
        if timing.ms is None or our_ms is None:
            text.append(f"{start} {timing.note}")
            continue
        value, share, unit = rate(problem, timing.ms)
        versus = "" if name == OURS else f"ours {timing.ms / our_ms:5.2f}x"
        versus += f"  error {timing.error:.4f}"
        text.append(f"{start} {timing.ms:9.4f} ms {value:8.2f} {unit:7} {share:6.1%}  {versus} {timing.note}")
    return text


def result_json(results: Mapping[Problem, Mapping[str, Timing]]) -> dict[str, Any]:
    """The run in one object.

    Each part goes by case: our figures, the bytes and FLOPs counted with the least time for them, the share
    of that time in ours, and every rival's figures or why it has none.
    """
    rivals: dict[str, dict[str, Any]] = {}
    for problem, timings in results.items():
        for name, timing in timings.items():
            if name != OURS:
                rivals.setdefault(name, {})[problem.name] = _figure(problem, timing)
    ours_by_case = {problem: timings[OURS] for problem, timings in results.items()}
    return {
        "bench": "gpu_kernels",
        "figure": {problem.name: _figure(problem, timing) for problem, timing in ours_by_case.items()},
        "ceiling": {
            "device": asdict(CEILINGS["h100"]),
            "cases": {problem.name: _counted(problem) for problem in results},
        },
        "share": {
            problem.name: None if timing.ms is None else round(floor_ms(problem) / timing.ms, 4)
            for problem, timing in ours_by_case.items()
        },
        "rival": rivals,
        **machine(),
    }


def _figure(problem: Problem, timing: Timing) -> dict[str, float | str]:
    if timing.ms is None:
        return {"error": timing.note}
    value, _, unit = rate(problem, timing.ms)
    return {"ms": round(timing.ms, 5), unit: round(value, 3)}


def _counted(problem: Problem) -> dict[str, float]:
    return {
        "read_bytes": problem.kv_bytes,
        "flop": problem.flop,
        "floor_ms": round(floor_ms(problem), 5),
    }


def main() -> None:
    """Time every case; exit status 1 where there is no GPU."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--cases", choices=("decode", "prefill", "all"), default="all")
    parser.add_argument("--rivals", nargs="*", choices=tuple(RIVALS), default=list(RIVALS))
    parser.add_argument("--seconds", type=float, default=0.6, help="of timing for each case")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing to measure here")
    rivals = {name: RIVALS[name] for name in args.rivals}
    results: dict[Problem, dict[str, Timing]] = {}
    for problem in problems(args.cases):
        timings = time_case(Case(problem, torch.device("cuda")), rivals, args.seconds)
        results[problem] = timings
        print("\n".join(lines(problem, timings)), flush=True)
        gc.collect()  # graphs hold their case in cycles, and the next one needs its gigabytes
        torch.cuda.empty_cache()
    print(json.dumps(result_json(results)))


if __name__ == "__main__":
    main()
