"""Result files: what a run leaves for later, and the reading of an earlier one to compare with.

A file is one JSON object with the keys of `vllm bench serve --save-result` (0.26), and beside them what
our result line holds. With --append-result each run adds a line.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.bench.report import Settings
from cluster.bench.summary import Record
from cluster.bench.workload import BenchError

_MUST_HAVE = "output_throughput"  # in every result of ours and of vLLM's
_WORK = ("completed", "total_input_tokens", "total_output_tokens", "request_rate", "max_concurrency")


def result_path(folder: Path, filename: str | None, label: str | None, settings: Settings) -> Path:
    """Where a result file goes; without a name of its own it gets one like vLLM's."""
    rate = "trace" if settings.request_rate is None else settings.request_rate
    concurrency = f"-concurrency{settings.max_concurrency}" if settings.max_concurrency else ""
    model, now = settings.model.split("/")[-1], dt.datetime.now()
    name = f"{label or settings.backend}-{rate}qps{concurrency}-{model}-{now:%Y%m%d-%H%M%S}.json"
    return folder / (filename or name)


def content(line: Mapping[str, Any], settings: Settings, records: Sequence[Record] | None) -> dict[str, Any]:
    """What a result file holds.

    Args:
        line: the run's result line with its `options` and `figure`.
        records: to keep every request's lengths, times, text and error, in the order of sending.
    """
    told = line["options"]
    kept: dict[str, Any] = {
        "date": f"{dt.datetime.now():%Y%m%d-%H%M%S}",
        "endpoint_type": settings.backend,
        "backend": settings.backend,
        "label": told["label"],
        "model_id": settings.model,
        "tokenizer_id": told["tokenizer"],
        "num_prompts": told["num_prompts"],
        "request_rate": told["request_rate"],
        "burstiness": told["burstiness"],
        "max_concurrency": settings.max_concurrency,
    }
    kept |= {name: value for name, value in line.items() if name != "figure"}
    kept |= line["figure"]
    return kept if records is None else kept | _per_request(records)


def _per_request(records: Sequence[Record]) -> dict[str, list[Any]]:
    """One entry a request in each list: a failed one has its error, and what came before it."""
    return {
        "input_lens": [record.prompt_tokens for record in records],
        "output_lens": [record.output_tokens if record.succeeded else 0 for record in records],
        "ttfts": [record.ttft_s if record.delta_times_s else 0.0 for record in records],
        "itls": [record.gaps_s for record in records],
        "start_times": [record.start_s for record in records],
        "generated_texts": ["".join(record.pieces) for record in records],
        "errors": [record.error or ("" if record.finished else "interrupted") for record in records],
    }


def save(path: Path, content: Mapping[str, Any], append: bool) -> None:
    """Write a result file, or add to it. Raises OSError if it cannot be."""
    with path.open("a" if append else "w", encoding="utf-8") as file:
        file.write(json.dumps(content, allow_nan=False) + "\n")


def read_rival(path: Path) -> dict[str, Any]:
    """An earlier result, ours or vLLM's: a saved file (of appended runs the last) or a result line.

    Raises:
        BenchError: it cannot be read, or holds no result.
    """
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"--rival {path} cannot be read: {error}") from error
    try:
        found = json.loads(text.splitlines()[-1] if text else "")
    except json.JSONDecodeError:
        try:
            found = json.loads(text)  # one object over several lines
        except json.JSONDecodeError as error:
            raise BenchError(f"--rival {path} is not JSON: {error}") from error
    if isinstance(found, dict) and isinstance(found.get("figure"), dict):
        found = found | found["figure"] | {"figure": None}
    if not isinstance(found, dict) or not _is_number(found.get(_MUST_HAVE)):
        raise BenchError(f"--rival {path} holds no result of a serving benchmark: it has no {_MUST_HAVE}")
    return found | {"file": str(path)}


def compare(
    figure: Mapping[str, Any], rival: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The rival's figures beside ours.

    Returns:
        `figure`: the rival's, of the names that both have; `ratio`: ours over the rival's; `differs`:
        where the two did different work, (ours, the rival's) by name.
    """
    common = [name for name, value in figure.items() if _is_number(value) and _is_number(rival.get(name))]
    work = {**options, **figure}
    about = ("file", "date", "backend", "label", "gpu", "versions", "commit")
    return {
        **{name: rival.get(name) for name in about},
        "model": rival.get("model_id") or rival.get("model"),
        "figure": {name: rival[name] for name in common},
        "ratio": {name: round(figure[name] / rival[name], 4) for name in common if rival[name]},
        "differs": {
            name: [work[name], rival[name]]
            for name in _WORK
            if name in rival and work.get(name) != rival[name]
        },
    }


def comparison_lines(rival: Mapping[str, Any]) -> list[str]:
    """The comparison for a reader: throughput and median latencies, and any difference in the work."""
    names = (_MUST_HAVE, "request_throughput", "median_ttft_ms", "median_tpot_ms", "median_itl_ms")
    ratios = [f"{name} {rival['ratio'][name]:.2f}" for name in names if name in rival["ratio"]]
    lines = [f"ours / {rival['file']}: {', '.join(ratios)}"]
    if rival["differs"]:
        told = ", ".join(
            f"{name} {ours} here, {theirs} there" for name, (ours, theirs) in rival["differs"].items()
        )
        lines.append(f"the work was not the same: {told}")
    return lines


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
