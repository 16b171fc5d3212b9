"""Our engine with one thing more on each rung, on the same workloads; vLLM beside them if it is there.

    python -m tests.bench.ablation_ladder --workload chats-64x10x1024 --vllm-site ~/site      # on a GPU
    python -m tests.bench.ablation_ladder --model demo --workload demo-chats-4x3x96
    python -m tests.bench.ablation_ladder --rungs elastic balloon slo deposit --balloon-gib 100 \
        --workload capped-120x8000+512-poisson3 --no-prefix-caching --vllm-site ~/site

    static    every slot is backed for the longest sequence at start, the largest activation set aside
    virtual   KV is backed on demand, the largest activation set aside
    elastic   one pool: KV has what activations do not need now
    sharing   and equal prefixes are computed, and held, once

For loads with promises, without prefix cache, upwards from `elastic`:

    balloon     a sequence that cannot grow goes to host memory instead of being computed again
    layer-wise  prompts that nobody makes room for are computed into host memory, and wait there
    slo         sequences take turns on the device, so that first tokens are in time
    deposit     tokens that are ahead of their clients are held back meanwhile

All but the last two are first come, first served; those above `balloon` have no host memory. The longest
sequence (`--max-model-len`) is that of the workloads, unless it is given, for every rung alike: static mode
holds as many sequences of that length as fit. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from cluster.bench.named import named_workload
from cluster.bench.workload import Workload
from tests.bench import engine_options
from tests.bench.engine_options import EngineOptions
from tests.bench.models import LLAMAS, MODELS
from tests.bench.processes import Contender, add_process_arguments, medians, pick, run_contender
from tests.bench.promises import PROMISES
from tests.bench.promises import table as promises_table
from tests.bench.run_engine import WARM_UP, add_round_arguments, checked_workloads

_MEMORY = EngineOptions(mode="elastic", prefix_caching=False, policy="fcfs", balloon_gib=0.0)
_PROMISES = replace(_MEMORY, balloon_gib=None)  # that of the command line, or the engine's own
RUNGS: Mapping[str, EngineOptions] = {
    "static": replace(_MEMORY, mode="static"),
    "virtual": replace(_MEMORY, mode="virtual"),
    "elastic": _MEMORY,
    "sharing": replace(_MEMORY, prefix_caching=True),
    "balloon": replace(_PROMISES, layer_wise=False),
    "layer-wise": replace(_PROMISES, layer_wise=True),
    "slo": replace(_PROMISES, layer_wise=True, policy="slo", deposit=False),
    "deposit": replace(_PROMISES, layer_wise=True, policy="slo", deposit=True),
}
_DEFAULT_RUNGS = ("static", "virtual", "elastic", "sharing")
_RUNGS_OWN = ("mode", "policy", "deposit", "layer_wise")  # options that are what a rung is
_FIGURE = (
    *("duration", "output_throughput", "completed", "failed", "total_input_tokens", "total_cached_tokens"),
    *("mean_ttft_ms", "p50_ttft_ms", "p99_ttft_ms", "p50_tpot_ms", "p99_tpot_ms", "max_gap_ms"),
    *("steps", "memory", "floor_s", "phases_s", "share_of_floor", "share_of_phases"),
    *PROMISES,
)


def main() -> None:
    """Climb, print a row for each rung in both tables and the JSON line.

    Exit status 1 if one of ours failed or there is no GPU, 2 for options that cannot be.
    """
    args, workloads, options = _read_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    results = {
        contender.name: run_contender(contender, workloads, args)
        for contender in contenders(args.rungs, options, args.vllm_site is not None)
    }
    print(table(results))
    print(promises_table(_rounds(results)))
    print(json.dumps(result_json(results)))
    sys.exit(1 if any("error" in result for name, result in results.items() if name in RUNGS) else 0)


def _read_arguments() -> tuple[argparse.Namespace, list[Workload], EngineOptions]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, default=_DEFAULT_RUNGS)
    parser.add_argument("--model", choices=MODELS, default="llama-8b")
    parser.add_argument("--workload", nargs="+", required=True)
    add_round_arguments(parser)
    engine_options.add_arguments(parser)
    add_process_arguments(parser)
    args = parser.parse_args()
    workloads = checked_workloads(parser, args.workload, args)
    options = engine_options.check(parser, args)
    for name in _RUNGS_OWN:
        if getattr(options, name) is not None:
            flag = engine_options.flag(name)
            parser.error(f"{flag}: each rung has its own; name those to climb with --rungs")
    with_balloon = [name for name in args.rungs if RUNGS[name].balloon_gib is None]
    if with_balloon and options.balloon_gib == 0:
        parser.error(f"--balloon-gib 0 leaves nothing to {', '.join(with_balloon)}: name other --rungs")
    if args.model not in LLAMAS and args.vllm_site is not None:
        parser.error("vLLM is measured with --model llama-8b: leave --vllm-site out")
    if args.model in LLAMAS and not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing to measure here but --model demo")
    everything = [*workloads, named_workload(WARM_UP[args.model])]
    longest = max(r.prompt_tokens + r.output_tokens for workload in everything for r in workload.requests)
    return args, workloads, replace(options, max_model_len=options.max_model_len or longest)


def contenders(rungs: Sequence[str], options: EngineOptions, with_vllm: bool) -> list[Contender]:
    """The rungs in the ladder's order, with what is common to all, and vLLM last.

    vLLM has its prefix cache unless `options` say otherwise; on ours that is a rung of its own.
    """
    found = [
        Contender(
            name,
            "ballonet",
            replace(
                options,
                mode=rung.mode,
                prefix_caching=rung.prefix_caching,
                policy=rung.policy,
                deposit=rung.deposit,
                layer_wise=rung.layer_wise,
                balloon_gib=options.balloon_gib if rung.balloon_gib is None else rung.balloon_gib,
            ),
        )
        for name, rung in RUNGS.items()
        if name in rungs
    ]
    return [*found, Contender("vllm", "vllm", options.of_any_engine())] if with_vllm else found


def _rounds(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """(workload, rung, its median round), for each rung that ran it."""
    return [(name, rung, best) for rung, result in results.items() for name, best in medians(result).items()]


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each workload and rung, with its time over that of the first rung that ran it."""
    lines = [
        f"{'workload':26} {'rung':8} {'s':>8} {'speed-up':>8} {'out tok/s':>9} {'mean TTFT s':>11} "
        f"{'p99 TPOT ms':>11} {'running':>7} {'KV GiB':>7} {'cached':>7} {'decode p99/max ms':>18} "
        f"{'of phases':>9}"
    ]
    first: dict[str, float] = {}
    for rung, result in results.items():
        if "error" in result:
            lines.append(f"{'-':26} {rung:8} {result['error']}")
        for name, best in medians(result).items():
            lines.append(_row(name, rung, best, first.setdefault(name, best["duration"])))
    return "\n".join(lines)


def _row(name: str, rung: str, best: Mapping[str, Any], first_s: float) -> str:
    steps, memory = best["steps"], best.get("memory", {})
    decode = [
        f"{steps[f'decode_step_{of}_ms']:.2f}" if steps["decode_steps"] else "" for of in ("p99", "max")
    ]
    kv = f"{memory['max_kv_gib']:.2f}" if memory else ""
    cached = best["total_cached_tokens"] / max(1, best["total_input_tokens"])
    share = f"{best['share_of_phases']:.1%}" if "share_of_phases" in best else ""
    return (
        f"{name:26} {rung:8} {best['duration']:8.2f} {first_s / best['duration']:8.3f} "
        f"{best['output_throughput']:9.1f} {best['mean_ttft_ms'] / 1e3:11.3f} {best['p99_tpot_ms']:11.2f} "
        f"{steps['max_running']:7} {kv:>7} {cached:7.1%} {'/'.join(decode):>18} {share:>9}"
    )


def result_json(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The ladder in one object: of each rung what it was told and the median round of each workload."""
    told = {
        rung: pick(result, ("options", "ready_s", "error"))
        | {"figure": {name: pick(best, _FIGURE) for name, best in medians(result).items()}}
        for rung, result in results.items()
    }
    any_result = next(iter(results.values()), {})
    return {
        "bench": "ablation_ladder",
        "model": any_result.get("model"),
        "rungs": {rung: one for rung, one in told.items() if rung in RUNGS},
        "rival": told.get("vllm"),
        **{name: any_result.get(name) for name in ("gpu", "versions", "commit")},
    }


if __name__ == "__main__":
    main()
