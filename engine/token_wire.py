"""Deltas as bytes, on their way from an engine's process to the ingress: JSON, so that nothing a stranger
sends is ever executed.

A message is two frames, the ingress' secret and the rows, one a delta:
`[stream, token ids, finish reason, error, preemptions, cached tokens, logprobs]`. It is answered by one
empty frame, the receipt.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson

from engine.messages import TokenDelta, TokenLogprobs

SILENCE_S = (
    10.0  # after which an end takes the other for lost: a node that is, or is cut off, does not say so
)

Row = list[Any]
_MINUS_INFINITY = float("-inf")  # what JSON has no word for, and orjson writes as null


def encode(deltas: Iterable[tuple[int, TokenDelta]]) -> bytes:
    """(stream, delta) pairs, in order."""
    return orjson.dumps([_row(stream, delta) for stream, delta in deltas])


def decode(payload: bytes) -> list[Row]:
    """The rows of a message. Raises ValueError for anything that `encode` did not make."""
    rows = orjson.loads(payload)
    if not isinstance(rows, list) or not all(map(_is_row, rows)):
        raise ValueError("not a list of rows")
    return rows


def add(row: Row, later: Row) -> None:
    """Make of a row, in place, what `TokenDelta.then` makes of a delta and the next one."""
    row[1] += later[1]
    row[2:6] = later[2:6]
    if later[6]:
        row[6] = (row[6] or []) + later[6]


def to_delta(row: Row, request_id: str) -> TokenDelta:
    """The delta of a row, whose stream is the request's."""
    _, token_ids, finish_reason, error, num_preemptions, num_cached, logprobs = row
    return TokenDelta(
        request_id,
        tuple(token_ids),
        tuple([_logprobs(entry) for entry in logprobs]) if logprobs else (),
        finish_reason,
        error,
        num_preemptions,
        num_cached,
    )


def weight(delta: TokenDelta) -> int:
    """About how many numbers a delta is: what bounds the size of a message."""
    return len(delta.token_ids) + sum([2 + 2 * len(entry.top) for entry in delta.logprobs]) + 8


def _row(stream: int, delta: TokenDelta) -> Row:
    return [
        stream,
        delta.token_ids,
        delta.finish_reason,
        delta.error,
        delta.num_preemptions,
        delta.num_cached_tokens,
        [[entry.logprob, entry.top] for entry in delta.logprobs] if delta.logprobs else None,
    ]


def _is_row(row: object) -> bool:
    return isinstance(row, list) and len(row) == 7 and type(row[0]) is int and type(row[1]) is list


def _logprobs(entry: list[Any]) -> TokenLogprobs:
    logprob, top = entry
    return TokenLogprobs(_number(logprob), tuple([(token_id, _number(value)) for token_id, value in top]))


def _number(value: float | None) -> float:
    return _MINUS_INFINITY if value is None else value
