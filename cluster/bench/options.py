"""The options of a benchmark, read and checked: every mistake is found before the first request."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from cluster.bench import floor, report, traces
from cluster.bench.summary import read_objectives
from cluster.bench.workload import (
    BenchError,
    PlannedRequest,
    RandomPlan,
    Workload,
    named_workload,
    with_arrivals,
)

DATASETS = ("random", "sharegpt", "burstgpt", "azure", "mooncake")
_ENDPOINTS = {"openai": "/v1/completions", "vllm": "/v1/completions", "openai-chat": "/v1/chat/completions"}
BACKENDS = tuple(_ENDPOINTS)


@dataclass(frozen=True, slots=True)
class Options:
    """Options of `ballonet bench`; names and meanings are those of `vllm bench serve`.

    Attributes:
        workload: a named workload, instead of a dataset; its lengths and seed are its own.
        request_rate: requests/s; None keeps a trace's own times, and sends everything else at once.
        self_timed: whether a trace's own times count; None means if no rate is given.
        ignore_eos: None means for synthetic prompts, whose answers have no end of their own.
        goodput: objectives such as `ttft:200`, in milliseconds.
        model_config: of the model, for the ceiling; `gpu` names whose.
    """

    base_url: str
    model: str | None = None
    served_model_name: str | None = None
    backend: str = "openai"
    endpoint: str | None = None
    api_key: str | None = None
    header: Sequence[str] = ()
    workload: str | None = None
    dataset_name: str = "random"
    dataset_path: Path | None = None
    tokenizer: str | None = None
    num_prompts: int = 1000
    request_rate: float | None = None
    burstiness: float = 1.0
    self_timed: bool | None = None
    max_concurrency: int | None = None
    seed: int = 0
    random_input_len: int = 1024
    random_output_len: int = 128
    random_range_ratio: float = 0.0
    random_prefix_len: int = 0
    sharegpt_output_len: int | None = None
    vocab_size: int = 32_000
    ignore_eos: bool | None = None
    temperature: float = 0.0
    extra_body: str | None = None
    num_warmups: int = 0
    goodput: Sequence[str] = ()
    percentile_metrics: str = "ttft,tpot,itl"
    metric_percentiles: str = "99"
    save_result: bool = False
    save_detailed: bool = False
    result_dir: Path = Path(".")
    result_filename: str | None = None
    metadata: Sequence[str] = ()
    disable_tqdm: bool = False
    model_config: Path | None = None
    gpu: str | None = None

    @property
    def server(self) -> str:
        """The base URL without the `/v1` that OpenAI's clients want in theirs."""
        return self.base_url.rstrip("/").removesuffix("/v1")


@dataclass(frozen=True, slots=True)
class Checked:
    """What had to be read out of the options."""

    url: str
    headers: Mapping[str, str]
    objectives_ms: Mapping[str, float]
    metrics: Sequence[str]
    percentiles: Sequence[float]
    metadata: Mapping[str, str]
    extra_body: Mapping[str, Any] = field(default_factory=dict)


def check(options: Options) -> Checked:
    """Read the options that are texts.

    Raises:
        BenchError: one that cannot be, by name.
    """
    for name, value, allowed in (
        ("dataset-name", options.dataset_name, DATASETS),
        ("backend", options.backend, BACKENDS),
        ("gpu", options.gpu or "h100", tuple(floor.CEILINGS)),
    ):
        if value not in allowed:
            raise BenchError(f"--{name} must be one of {', '.join(allowed)}, not {value!r}")
    if (options.model_config is None) != (options.gpu is None):
        raise BenchError("--model-config and --gpu belong together: one has the work, the other the ceiling")
    for name, number in (("num-prompts", options.num_prompts), ("max-concurrency", options.max_concurrency)):
        if number is not None and number < 1:
            raise BenchError(f"--{name} must be at least 1, not {number}")
    metrics = [name for name in options.percentile_metrics.split(",") if name]
    if unknown := sorted(set(metrics) - set(report.PERCENTILE_METRICS)):
        known = ", ".join(report.PERCENTILE_METRICS)
        raise BenchError(f"--percentile-metrics knows {known}, not {', '.join(unknown)}")
    headers = {"Content-Type": "application/json"}
    if options.api_key:
        headers["Authorization"] = f"Bearer {options.api_key}"
    return Checked(
        url=options.server + (options.endpoint or _ENDPOINTS[options.backend]),
        headers=headers | _pairs("--header", options.header),
        objectives_ms=read_objectives(options.goodput),
        metrics=metrics,
        percentiles=_percentiles(options.metric_percentiles),
        metadata=_pairs("--metadata", options.metadata),
        extra_body=_extra_body(options.extra_body),
    )


def _percentiles(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value <= 100 for value in values):
        raise BenchError(f"--metric-percentiles must be numbers from 0 to 100 such as 50,99, not {text!r}")
    return values


def _pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    for name, sign, _ in pairs:
        if not name or not sign:
            raise BenchError(f"{option} must be KEY=VALUE, not {name!r}")
    return {name: value for name, _, value in pairs}


def _extra_body(text: str | None) -> dict[str, Any]:
    try:
        body = orjson.loads(text or "{}")
    except orjson.JSONDecodeError as error:
        raise BenchError(f"--extra-body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise BenchError(f"--extra-body must be a JSON object, not {text}")
    return body


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
        return traces.read_sharegpt(
            path, count, options.seed, options.sharegpt_output_len, _counter(options.tokenizer)
        )
    readers = {
        "burstgpt": traces.read_burstgpt,
        "azure": traces.read_azure,
        "mooncake": traces.read_mooncake,
    }
    return readers[options.dataset_name](path, count)


def _counter(source: str | None) -> traces.CountTokens:
    if source is None:
        return traces.estimate_tokens
    from cluster.tokenizer import Tokenizer  # only here: it takes a second to load

    tokenizer = Tokenizer.load(source)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))
