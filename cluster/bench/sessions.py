"""How a conversation goes on over HTTP: the body of a later turn, from the body and the answer before it.

A chat sends the messages so far, with the answer's text. A completion sends the prompt so far, the answer
and the fresh part: as token ids if the server tells those of its answers (vLLM's `return_token_ids`), which
are then exactly what it has computed; else all of it as text, which any server takes, and which may be
other tokens than the answer's when it is read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import orjson

from cluster.bench.client import NextBody
from cluster.bench.summary import Record
from cluster.bench.workload import BenchError, PlannedRequest, Workload

History = Literal["messages", "token_ids", "text"]


def histories_to_try(workload: Workload, is_chat: bool) -> Sequence[History | None]:
    """Ways to go on, the best first; the last one works with every server. None where nothing goes on."""
    if not workload.has_sessions:
        return (None,)
    return ("messages",) if is_chat else ("token_ids", "text")


def fits(history: History | None, record: Record) -> bool:
    """Whether a server that answered so can be asked in that way."""
    return history != "token_ids" or (record.succeeded and _has_all_ids(record))


def next_body_of(history: History, workload: Workload, request: PlannedRequest) -> NextBody:
    """Makes the body of that later turn."""
    if history == "token_ids":
        return partial(_with_ids, workload.token_ids(request), request.output_tokens)
    add = _with_message if history == "messages" else _with_text
    return partial(add, workload.words(request), request.output_tokens)


def _has_all_ids(record: Record) -> bool:
    return bool(record.token_ids) and len(record.token_ids) == record.output_tokens


def _with_ids(fresh: list[int], output_tokens: int, body: bytes, record: Record) -> bytes:
    if not _has_all_ids(record):
        raise BenchError(
            f"its answer came with {len(record.token_ids)} token ids for {record.output_tokens} tokens"
        )
    before = orjson.loads(body)
    prompt = before["prompt"] + record.token_ids + fresh
    return orjson.dumps(before | {"prompt": prompt, "max_tokens": output_tokens})


def _with_text(fresh: str, output_tokens: int, body: bytes, record: Record) -> bytes:
    before = orjson.loads(body)
    prompt = f"{before['prompt']}{''.join(record.pieces)} {fresh}"
    return orjson.dumps(before | {"prompt": prompt, "max_tokens": output_tokens})


def _with_message(fresh: str, output_tokens: int, body: bytes, record: Record) -> bytes:
    before = orjson.loads(body)
    messages: list[dict[str, Any]] = [
        *before["messages"],
        {"role": "assistant", "content": "".join(record.pieces)},
        {"role": "user", "content": fresh},
    ]
    return orjson.dumps(before | {"messages": messages, "max_completion_tokens": output_tokens})
