"""Readers of public traces: ShareGPT, BurstGPT, Azure LLM inference (2023, 2024) and Mooncake.

Each gives requests in order of arrival. Where a trace has lengths and no text, prompts are random tokens
of those lengths. A line that cannot be read ends the reading with its number: a benchmark over half a
file would look like one over all of it.
"""

from __future__ import annotations

import csv
import datetime as dt
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from cluster.bench.workload import BenchError, PlannedRequest, Workload

_MOONCAKE_BLOCK_TOKENS = 512  # what one of its hash ids stands for
_CHARS_PER_TOKEN = 4  # of English text, where no tokenizer counts
_SHAREGPT_TOKENS = (4, 1024, 2048)  # shortest prompt and answer, longest prompt, longest both: vLLM's limits

_BEYOND_MICROSECONDS = re.compile(r"(\.\d{6})\d+")

CountTokens = Callable[[str], int]
Reader = Callable[[Path, int], list[PlannedRequest]]


def estimate_tokens(text: str) -> int:
    """About how many tokens a text has."""
    return max(1, len(text) // _CHARS_PER_TOKEN)


def read_sharegpt(
    path: Path,
    num_prompts: int,
    seed: int,
    output_len: int | None = None,
    count_tokens: CountTokens = estimate_tokens,
) -> list[PlannedRequest]:
    """The first question of each conversation and the length of its answer, shuffled by the seed.

    A JSON list of `{"conversations": [{"from": ..., "value": ...}, ...]}`. Conversations of fewer than
    two turns, and those outside vLLM's limits of length, are left out. All arrive at once.
    """
    try:
        conversations = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise BenchError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    if not isinstance(conversations, list):
        raise BenchError(f"{path}, line 1: ShareGPT is a list of conversations, not {_kind(conversations)}")
    pairs = [pair for number, entry in enumerate(conversations, 1) if (pair := _pair(path, number, entry))]
    random.Random(f"{seed}/sharegpt").shuffle(pairs)
    least, longest_prompt, longest = _SHAREGPT_TOKENS
    requests: list[PlannedRequest] = []
    for prompt, answer in pairs:
        if len(requests) == num_prompts:
            break
        num_in, num_out = count_tokens(prompt), output_len or count_tokens(answer)
        too_short = num_in < least or (num_out < least and output_len is None)
        if not too_short and num_in <= longest_prompt and num_in + num_out <= longest:
            requests.append(PlannedRequest(0.0, num_in, num_out, text=prompt))
    return _not_empty(path, requests)


def _pair(path: Path, number: int, entry: Any) -> tuple[str, str] | None:
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(turns, list):
        raise BenchError(f"{path}, conversation {number}: no list called `conversations`")
    if len(turns) < 2:
        return None
    question, answer = (turn.get("value") if isinstance(turn, dict) else None for turn in turns[:2])
    if not isinstance(question, str) or not isinstance(answer, str):
        raise BenchError(f"{path}, conversation {number}: a turn without a text called `value`")
    return question, answer


def read_burstgpt(path: Path, num_prompts: int) -> list[PlannedRequest]:
    """The calls to GPT-4 that were answered, as vLLM reads the file; times are seconds in the trace."""
    rows = _rows(path, ("Timestamp", "Model", "Request tokens", "Response tokens"))
    calls = (
        _lengths(path, line, _number(path, line, row, "Timestamp"), row, "Request tokens", "Response tokens")
        for line, row in rows
        if row["Model"] == "GPT-4" and _count(path, line, row, "Response tokens") > 0
    )
    return _first(path, calls, num_prompts)


def read_azure(path: Path, num_prompts: int) -> list[PlannedRequest]:
    """The Azure LLM inference traces: `TIMESTAMP,ContextTokens,GeneratedTokens`, times as dates.

    2023 writes seven digits of a second and no zone, 2024 six digits and a zone.
    """
    rows = _rows(path, ("TIMESTAMP", "ContextTokens", "GeneratedTokens"))
    calls = (
        _lengths(path, line, _date_s(path, line, row["TIMESTAMP"]), row, "ContextTokens", "GeneratedTokens")
        for line, row in rows
    )
    return _first(path, calls, num_prompts)


def read_mooncake(path: Path, num_prompts: int) -> list[PlannedRequest]:
    """`timestamp` in milliseconds, `input_length`, `output_length`, `hash_ids` of blocks of 512 tokens.

    Equal hash ids become equal tokens, so that prompts share the prefixes they shared.
    """

    def requests() -> Iterator[PlannedRequest]:
        for line, text in enumerate(_lines(path), 1):
            if text.strip():
                yield _mooncake_request(path, line, text)

    return _first(path, requests(), num_prompts)


def _mooncake_request(path: Path, line: int, text: str) -> PlannedRequest:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise BenchError(f"{path}, line {line}: not JSON ({error.msg})") from error
    if not isinstance(row, dict):
        raise BenchError(f"{path}, line {line}: not an object but {_kind(row)}")
    num_in = max(1, _count(path, line, row, "input_length"))
    num_out = max(1, _count(path, line, row, "output_length"))
    hash_ids = row.get("hash_ids", [])
    if not isinstance(hash_ids, list) or len(hash_ids) > -(-num_in // _MOONCAKE_BLOCK_TOKENS):
        raise BenchError(
            f"{path}, line {line}: `hash_ids` must be a list of at most one id for each "
            f"{_MOONCAKE_BLOCK_TOKENS} tokens of input"
        )
    parts, left = [], num_in
    for hash_id in hash_ids:
        parts.append((f"block {hash_id}", min(left, _MOONCAKE_BLOCK_TOKENS)))
        left -= parts[-1][1]
    if left:
        parts.append((f"line {line}", left))
    return PlannedRequest(_number(path, line, row, "timestamp") / 1e3, num_in, num_out, tuple(parts))


def trace_workload(name: str, requests: list[PlannedRequest], seed: int, vocab_size: int) -> Workload:
    """A workload of a trace's requests, its first one at time 0, each at its own time."""
    start_s = requests[0].arrival_s
    moved = tuple(
        PlannedRequest(r.arrival_s - start_s, r.prompt_tokens, r.output_tokens, r.parts, r.text)
        for r in requests
    )
    return Workload(name, moved, seed, vocab_size, request_rate=None)


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, Mapping[str, str]]]:
    reader = csv.DictReader(_lines(path))
    missing = [column for column in columns if column not in (reader.fieldnames or ())]
    if missing:
        raise BenchError(
            f"{path}, line 1: no column {', '.join(missing)}; the header is {reader.fieldnames or 'missing'}"
        )
    for row in reader:
        if any(row[column] is None for column in columns):
            raise BenchError(f"{path}, line {reader.line_num}: fewer columns than the header")
        yield reader.line_num, row


def _lengths(
    path: Path, line: int, time_s: float, row: Mapping[str, Any], prompt: str, output: str
) -> PlannedRequest:
    num_in, num_out = _count(path, line, row, prompt), _count(path, line, row, output)
    num_in = max(1, num_in)
    return PlannedRequest(time_s, num_in, max(1, num_out), ((f"line {line}", num_in),))


def _number(path: Path, line: int, row: Mapping[str, Any], name: str) -> float:
    value = row.get(name)
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise BenchError(f"{path}, line {line}: `{name}` must be a number, not {value!r}") from error


def _count(path: Path, line: int, row: Mapping[str, Any], name: str) -> int:
    value = _number(path, line, row, name)
    if value < 0 or value != int(value):
        raise BenchError(f"{path}, line {line}: `{name}` must be a number of tokens, not {row[name]!r}")
    return int(value)


def _date_s(path: Path, line: int, text: str) -> float:
    """Seconds since the epoch; a time without a zone is UTC. Digits beyond microseconds are dropped."""
    try:
        moment = dt.datetime.fromisoformat(_BEYOND_MICROSECONDS.sub(r"\1", text.strip()))
    except ValueError as error:
        raise BenchError(f"{path}, line {line}: `TIMESTAMP` must be a date and time, not {text!r}") from error
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=dt.UTC)
    return moment.timestamp()


def _first(path: Path, requests: Iterator[PlannedRequest], count: int) -> list[PlannedRequest]:
    """The first `count` requests, in order of arrival."""
    return sorted(_not_empty(path, list(islice(requests, count))), key=lambda request: request.arrival_s)


def _not_empty(path: Path, requests: list[PlannedRequest]) -> list[PlannedRequest]:
    if not requests:
        raise BenchError(f"{path} has no request that can be used")
    return requests


def _lines(path: Path) -> Iterator[str]:
    """Line by line: of a trace of half a gigabyte often only the first hundred requests are wanted."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from file
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> BenchError:
    return BenchError(f"--dataset-path {path} cannot be read: {error}")


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"
