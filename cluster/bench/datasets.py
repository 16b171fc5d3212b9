"""Which workload the options describe: a named one, random prompts, or a trace's requests."""

from __future__ import annotations

import functools
import math

from cluster.bench import traces
from cluster.bench.named import named_workload
from cluster.bench.options import Options
from cluster.bench.workload import (
    BenchError,
    PlannedRequest,
    RandomPlan,
    Workload,
    with_arrivals,
)


def make_workload(options: Options) -> Workload:
    """The workload that the options describe.

    Raises:
        BenchError: they describe none.
    """
    if options.workload is not None:
        named = named_workload(options.workload)
        return (
            named
            if options.request_rate is None
            else with_arrivals(named, _rate(options), options.burstiness)
        )
    if options.dataset_name == "random":
        plan = RandomPlan(
            options.num_prompts,
            options.random_input_len,
            options.random_output_len,
            options.random_range_ratio,
            options.random_prefix_len,
            _rate(options),
            options.burstiness,
            options.seed,
            options.vocab_size,
        )
        return plan.workload("random")
    workload = traces.trace_workload(options.dataset_name, _read(options), options.seed, options.vocab_size)
    own_times = options.request_rate is None if options.self_timed is None else options.self_timed
    if own_times and options.dataset_name != "sharegpt":
        return workload
    return with_arrivals(workload, _rate(options), options.burstiness)


def _rate(options: Options) -> float:
    return math.inf if options.request_rate is None else options.request_rate


def _read(options: Options) -> list[PlannedRequest]:
    path, count = options.dataset_path, options.num_prompts
    if path is None:
        raise BenchError(f"--dataset-name {options.dataset_name} needs --dataset-path")
    if options.dataset_name == "sharegpt":
        counter = token_counter(options.tokenizer) or traces.estimate_tokens
        return traces.read_sharegpt(path, count, options.seed, options.sharegpt_output_len, counter)
    readers = {
        "burstgpt": traces.read_burstgpt,
        "azure": traces.read_azure,
        "mooncake": traces.read_mooncake,
    }
    return readers[options.dataset_name](path, count)


@functools.cache
def token_counter(source: str | None) -> traces.CountTokens | None:
    """Counts a text's tokens with that tokenizer; None without one.

    Raises:
        ModelLoadError: there is no such tokenizer.
    """
    if source is None:
        return None
    from cluster.tokenizer import Tokenizer  # only here: it takes a second to load

    tokenizer = Tokenizer.load(source)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))
