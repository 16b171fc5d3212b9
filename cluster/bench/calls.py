"""A workload's requests as the bodies that are sent, encoded before the clock starts.

Bodies of later turns hold answers: they are made when those have come, by `sessions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from cluster.bench.client import Call
from cluster.bench.options import Checked, Options
from cluster.bench.sessions import History, next_body_of
from cluster.bench.workload import PlannedRequest, Workload


def make_calls(
    options: Options,
    checked: Checked,
    workload: Workload,
    requests: Sequence[PlannedRequest],
    model: str,
    history: History | None,
) -> list[Call]:
    """The requests, whose tokens are drawn by the workload, as calls to that model.

    Args:
        history: how the later turns among them go on.
    """
    common: dict[str, Any] = {
        "model": options.served_model_name or model,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if options.temperature is not None:
        common["temperature"] = options.temperature
    if options.sends_ignore_eos:
        common["ignore_eos"] = True
    if history == "token_ids":
        common["return_token_ids"] = True
    calls = []
    for request in requests:
        tokens = request.prompt_tokens
        if history is None or request.follows is None:
            prompt = _chat(workload, request) if checked.is_chat else _completion(workload, request, history)
            body = orjson.dumps(common | prompt | dict(checked.extra_body))
            calls.append(Call(request.arrival_s, tokens, body))
        else:
            made = next_body_of(history, workload, request)
            calls.append(Call(0.0, tokens, b"", request.follows, request.think_s, made))
    return calls


def _chat(workload: Workload, request: PlannedRequest) -> dict[str, Any]:
    messages = [{"role": "user", "content": workload.words(request)}]
    return {"messages": messages, "max_completion_tokens": request.output_tokens}


def _completion(workload: Workload, request: PlannedRequest, history: History | None) -> dict[str, Any]:
    words = workload.words(request) if history == "text" else request.text
    return {"prompt": words or workload.token_ids(request), "max_tokens": request.output_tokens}
