"""The options of a benchmark, read and checked: every mistake is found before the first request."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from cluster.bench import floor, report
from cluster.bench.summary import read_objectives
from cluster.bench.workload import BenchError, Workload

_TRACE = ("dataset_name", "dataset_path", "num_prompts", "seed", "vocab_size", "self_timed")
# Which of the options that describe requests each dataset reads; a named workload reads none.
_READ_BY = {
    "random": (
        "dataset_name",
        "num_prompts",
        "seed",
        "vocab_size",
        "random_input_len",
        "random_output_len",
        "random_range_ratio",
        "random_prefix_len",
    ),
    "sharegpt": ("dataset_name", "dataset_path", "num_prompts", "seed", "sharegpt_output_len"),
    "burstgpt": _TRACE,
    "azure": _TRACE,
    "mooncake": _TRACE,
}
DATASETS = tuple(_READ_BY)
_ENDPOINTS = {"openai": "/v1/completions", "vllm": "/v1/completions", "openai-chat": "/v1/chat/completions"}
BACKENDS = tuple(_ENDPOINTS)


@dataclass(frozen=True, slots=True)
class Options:
    """Options of `ballonet bench`; names and meanings are those of `vllm bench serve`.

    Attributes:
        workload: a named workload, instead of a dataset; its lengths and seed are its own.
        given: names of the options that were written out: one that has no effect is refused.
        request_rate: requests/s; None keeps a trace's own times, and sends everything else at once.
        self_timed: whether a trace's own times count; None means if no rate is given.
        ignore_eos: None means for synthetic prompts, whose answers have no end of their own.
        temperature: None leaves it to the server, as `vllm bench serve` does.
        tokenizer: counts ShareGPT's tokens, and those of answers that come without `usage`.
        goodput: objectives such as `ttft:200`, in milliseconds.
        model_config: of the model, for the ceiling; `gpu` names whose.
        rival: an earlier result file, whose figures are set beside this run's.
        ready_check_timeout_sec: how long the server may take until it answers; 0 is one try.
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
    temperature: float | None = None
    extra_body: str | None = None
    num_warmups: int = 0
    goodput: Sequence[str] = ()
    percentile_metrics: str = "ttft,tpot,itl"
    metric_percentiles: str = "99"
    save_result: bool = False
    save_detailed: bool = False
    append_result: bool = False
    label: str | None = None
    rival: Path | None = None
    result_dir: Path = Path(".")
    result_filename: str | None = None
    metadata: Sequence[str] = ()
    disable_tqdm: bool = False
    model_config: Path | None = None
    gpu: str | None = None
    ready_check_timeout_sec: int = 0
    given: frozenset[str] = frozenset()

    @property
    def server(self) -> str:
        """The base URL without the `/v1` that OpenAI's clients want in theirs."""
        return self.base_url.rstrip("/").removesuffix("/v1")

    @property
    def saves(self) -> bool:
        """Whether a result file is wanted."""
        return self.save_result or self.save_detailed or self.append_result

    @property
    def sends_ignore_eos(self) -> bool:
        """Whether requests ask to generate past the end of an answer."""
        return self.dataset_name != "sharegpt" if self.ignore_eos is None else self.ignore_eos

    @property
    def read_for_requests(self) -> tuple[str, ...]:
        """Names of the options that describe the requests."""
        return ("workload",) if self.workload is not None else _READ_BY[self.dataset_name]


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

    @property
    def is_chat(self) -> bool:
        """Whether requests are messages; else they are prompts."""
        return self.url.endswith("/chat/completions")


def check(options: Options) -> Checked:
    """Read the options that are texts, and make the folder that results go to.

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
    _refuse_small_numbers(options)
    _refuse_ignored(options)
    _make_result_folder(options)
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


def _refuse_small_numbers(options: Options) -> None:
    for name, number, least in (
        ("num-prompts", options.num_prompts, 1),
        ("max-concurrency", options.max_concurrency, 1),
        ("vocab-size", options.vocab_size, 1),
        ("sharegpt-output-len", options.sharegpt_output_len, 1),
        ("num-warmups", options.num_warmups, 0),
        ("ready-check-timeout-sec", options.ready_check_timeout_sec, 0),
    ):
        if number is not None and number < least:
            raise BenchError(f"--{name} must be at least {least}, not {number}")


def _refuse_ignored(options: Options) -> None:
    """A run that silently leaves out what was asked for is another run."""
    describe = {name for names in _READ_BY.values() for name in names}
    ignored = sorted((options.given & describe) - set(options.read_for_requests))
    if ignored:
        named = options.workload is not None
        source = f"--workload {options.workload}" if named else f"--dataset-name {options.dataset_name}"
        raise BenchError(f"{', '.join(map(_flag, ignored))}: without effect on {source}, so leave it out")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _make_result_folder(options: Options) -> None:
    if not options.saves:
        return
    folder = (options.result_dir / (options.result_filename or "result.json")).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"--result-dir {folder} cannot be made: {error}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BenchError(f"--result-dir {folder} cannot be written to")


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
    for text, (name, sign, _) in zip(texts, pairs, strict=True):
        if not name or not sign:
            raise BenchError(f"{option} must be KEY=VALUE, not {text!r}")
    return {name.strip(): value.strip() for name, _, value in pairs}


def _extra_body(text: str | None) -> dict[str, Any]:
    try:
        body = orjson.loads(text or "{}")
    except orjson.JSONDecodeError as error:
        raise BenchError(f"--extra-body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise BenchError(f"--extra-body must be a JSON object, not {text}")
    return body


def told(options: Options, checked: Checked, workload: Workload) -> dict[str, Any]:
    """What was run, for the result: every option that shaped it. No headers and no key: they are secrets."""
    names = ("backend", "endpoint", "served_model_name", "tokenizer", "label", *options.read_for_requests)
    load = ("max_concurrency", "burstiness", "num_warmups", "temperature")
    facts = {name: getattr(options, name) for name in (*names, *load)}
    facts |= {
        "num_prompts": len(workload.requests),
        "seed": workload.seed,
        "vocab_size": workload.vocab_size,
        "request_rate": workload.request_rate,
        "ignore_eos": options.sends_ignore_eos,
        "extra_body": dict(checked.extra_body),
        "goodput": dict(checked.objectives_ms),
    }
    return {name: _plain(value) for name, value in facts.items()}


def _plain(value: Any) -> Any:
    """As JSON can hold it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value
