"""Every way a body can be wrong, and what the client is told."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from cluster.ingress import IngressConfig, create_app
from tests.unit.ingress_fakes import MAX_MODEL_LEN, VOCAB_SIZE, FakeModel, text_script

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "hi"}


def post(path: str, fields: dict[str, Any], model: FakeModel | None = None) -> Any:
    base: dict[str, Any] = {"model": "org/tiny"}
    base |= {"messages": [USER]} if path == CHAT else {"prompt": "hi"}
    model = model or FakeModel()
    with TestClient(create_app({model.model_id: model})) as client:
        return client.post(path, json=base | fields)


WRONG_ANYWHERE: list[tuple[dict[str, Any], str | None]] = [
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "0.5"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 1.1}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 33}, "n"),
    ({"n": True}, "n"),
    ({"best_of": 2}, "best_of"),
    ({"seed": 2**63}, "seed"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 1e-38}, "repetition_penalty"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 16.0}, "max_tokens"),
    ({"max_tokens": MAX_MODEL_LEN}, "max_tokens"),
    ({"max_tokens": 2, "min_tokens": 3}, "min_tokens"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop": "x" * 513}, "stop"),
    ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
    ({"stop_token_ids": ["1"]}, "stop_token_ids[0]"),
    ({"stream": "true"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, None),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{}]}, "functions"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"audio": {}}, "audio"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"suffix": "end"}, "suffix"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"prediction": {"type": "content"}}, "prediction"),
    ({"guided_json": {}}, "guided_json"),
    ({"priority": 1001}, "priority"),
    ({"priority": -1001}, "priority"),
    ({"priority": 0.5}, "priority"),
    ({"priority": "1"}, "priority"),
    ({"priority": True}, "priority"),
    ({"length_penalty": True}, "length_penalty"),
    ({"store": True}, "store"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": 7}, "cache_salt"),
    ({"cache_salt": ["a"]}, "cache_salt"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"temprature": 1}, "temprature"),
    ({"": 1}, ""),
    ({"model": 5}, "model"),
]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(("fields", "param"), WRONG_ANYWHERE, ids=lambda value: str(value)[:40])
def test_a_wrong_value_is_refused_by_name(path: str, fields: dict[str, Any], param: str | None) -> None:
    model = FakeModel()
    response = post(path, fields, model)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param or param is None
    assert (param or "").split(".")[0].split("[")[0] in error["message"]
    assert model.requests == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [USER, {"role": "user", "content": []}]}, "messages[1].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{**USER, "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_tokens"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"prompt": "hi"}, "prompt"),
        ({"echo": True}, "echo"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_chat_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    response = post(CHAT, fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [VOCAB_SIZE]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["ok", ""]}, "prompt"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"prompt": ["a"] * 10, "n": 32}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": True, "logprobs": 0}, "logprobs"),
        ({"messages": [USER]}, "messages"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_completion_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    response = post(COMPLETIONS, fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


NEUTRAL: dict[str, Any] = {
    "tools": [],
    "tool_choice": "none",
    "functions": None,
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "suffix": None,
    "use_beam_search": False,
    "best_of": 1,
    "length_penalty": 1.0,
    "prompt_logprobs": None,
    "parallel_tool_calls": True,
    "user": "u",
    "metadata": {"a": "b"},
    "store": False,
    "service_tier": "auto",
    "safety_identifier": "s",
    "temperature": None,
    "stop": None,
    "top_k": -1,
    "n": 1,
    "seed": -(2**63),
    "logit_bias": {"5": -100, "6": 1.5},
    "stop_token_ids": [],
    "stream": False,
    "stream_options": None,
    "cache_salt": None,
    "prompt_cache_key": "k",
    "priority": None,
}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("name", NEUTRAL)
def test_a_value_that_asks_for_nothing_is_accepted(path: str, name: str) -> None:
    assert post(path, {name: NEUTRAL[name]}).status_code == 200


def test_unknown_fields_name_their_nearest_known_one() -> None:
    assert "did you mean 'temperature'" in post(CHAT, {"temprature": 1}).json()["error"]["message"]
    assert "did you mean" not in post(CHAT, {"zzzzzzzz": 1}).json()["error"]["message"]


def test_required_fields_are_named() -> None:
    with TestClient(create_app({"org/tiny": FakeModel()})) as client:
        for path, body, param in (
            (CHAT, {"messages": [USER]}, "model"),
            (CHAT, {"model": "org/tiny"}, "messages"),
            (COMPLETIONS, {"model": "org/tiny", "prompt": None}, "prompt"),
        ):
            error = client.post(path, json=body).json()["error"]
            assert (error["param"], error["code"]) == (param, "missing_required_parameter")


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b'"x"', b"{'a': 1}", b'{"temperature": NaN}', b"\xff", b"[" * 5000]
)
def test_what_is_not_a_json_object_is_refused(raw: bytes) -> None:
    with TestClient(create_app({"org/tiny": FakeModel()})) as client:
        response = client.post(CHAT, content=raw)
    assert response.status_code == 400
    assert "JSON" in response.json()["error"]["message"]


def test_content_type_does_not_matter() -> None:
    body = b'{"model": "org/tiny", "prompt": "hi"}'
    with TestClient(create_app({"org/tiny": FakeModel()})) as client:
        response = client.post(COMPLETIONS, content=body, headers={"content-type": "text/plain"})
    assert response.status_code == 200


def test_bodies_are_limited_announced_or_not() -> None:
    app = create_app({"org/tiny": FakeModel()}, IngressConfig(max_body_bytes=100))
    with TestClient(app) as client:
        announced = client.post(COMPLETIONS, content=b"x" * 101)
        chunked = client.post(COMPLETIONS, content=iter([b"x" * 60, b"x" * 60]))
        fits = client.post(COMPLETIONS, json={"model": "org/tiny", "prompt": "hi"})
    assert (announced.status_code, chunked.status_code, fits.status_code) == (413, 413, 200)
    for response in (announced, chunked):
        assert "100 bytes" in response.json()["error"]["message"]


def test_context_length_is_told_in_numbers() -> None:
    for path, fields in (
        (COMPLETIONS, {"prompt": "x" * MAX_MODEL_LEN}),
        (COMPLETIONS, {"prompt": "x" * 150, "max_tokens": 51}),
        (CHAT, {"messages": [{"role": "user", "content": "x" * MAX_MODEL_LEN}]}),
        (CHAT, {"max_completion_tokens": 190}),
    ):
        error = post(path, fields).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert str(MAX_MODEL_LEN) in error["message"]


def test_default_max_tokens() -> None:
    model = FakeModel()
    post(COMPLETIONS, {}, model)
    post(COMPLETIONS, {"prompt": "x" * 190}, model)
    post(CHAT, {}, model)
    post(CHAT, {"max_completion_tokens": 7}, model)
    chat_prompt = len(model.requests[2].prompt_token_ids)
    limits = [request.sampling.max_tokens for request in model.requests]
    assert limits == [16, 10, MAX_MODEL_LEN - chat_prompt, 7]


def test_sampling_reaches_the_engine() -> None:
    model = FakeModel(text_script("ok"))
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "seed": 2**63 - 1,
        "n": 2,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.1,
        "logit_bias": {"7": 3},
        "stop_token_ids": [9],
        "ignore_eos": True,
        "min_tokens": 2,
        "max_tokens": 5,
        "logprobs": 2,
    }
    assert post(COMPLETIONS, fields, model).status_code == 200
    first, second = (request.sampling for request in model.requests)
    for name in set(fields) - {"seed", "n", "logit_bias", "stop_token_ids"}:
        assert getattr(first, name) == fields[name], name
    assert first.logit_bias == ((7, 3.0),)
    assert first.stop_token_ids == (9,)
    assert (first.seed, second.seed) == (2**63 - 1, -(2**63))  # each choice draws its own numbers


def test_messages_reach_the_template() -> None:
    model = FakeModel(text_script("ok"))
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": parts, "name": "ann"},
        {"role": "assistant", "content": "yes", "tool_calls": None, "refusal": None},
    ]
    fields = {"messages": messages, "chat_template_kwargs": {"suffix": "!"}}
    assert post(CHAT, fields, model).status_code == 200
    token_ids = model.requests[0].prompt_token_ids
    text = bytes(token if token < 256 else ord("|") for token in token_ids).decode()
    assert text == "|system:be kind||user:a\nb||assistant:yes||assistant:!"


def test_template_refusals_are_the_clients_to_read() -> None:
    error = post(CHAT, {"messages": [{"role": "assistant", "content": "x"}]}).json()["error"]
    assert "the user speaks first" in error["message"]
    missing = post(CHAT, {}, FakeModel(template=None))
    assert missing.status_code == 400
    assert "no chat template" in missing.json()["error"]["message"]
    broken = post(CHAT, {}, FakeModel(template="{{ messages.nothing.at.all }}"))
    assert broken.status_code == 400
