"""A workload's requests as the bodies that are sent, encoded before the clock starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from cluster.bench.client import Call
from cluster.bench.options import Checked, Options
from cluster.bench.workload import PlannedRequest, Workload


def make_calls(
    options: Options, checked: Checked, workload: Workload, requests: Sequence[PlannedRequest], model: str
) -> list[Call]:
    """The requests, whose tokens are drawn by the workload, as calls to that model."""
    common: dict[str, Any] = {
        "model": options.served_model_name or model,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if options.temperature is not None:
        common["temperature"] = options.temperature
    if options.sends_ignore_eos:
        common["ignore_eos"] = True
    chat = checked.url.endswith("/chat/completions")
    calls = []
    for request in requests:
        body = common | (_chat(workload, request) if chat else _completion(workload, request))
        body |= checked.extra_body
        calls.append(Call(request.arrival_s, request.prompt_tokens, orjson.dumps(body)))
    return calls


def _chat(workload: Workload, request: PlannedRequest) -> dict[str, Any]:
    messages = [{"role": "user", "content": workload.words(request)}]
    return {"messages": messages, "max_completion_tokens": request.output_tokens}


def _completion(workload: Workload, request: PlannedRequest) -> dict[str, Any]:
    return {"prompt": request.text or workload.token_ids(request), "max_tokens": request.output_tokens}
