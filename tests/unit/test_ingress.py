"""Whole answers, streams, keys, ids and errors of the front, with models that play scripts."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from cluster.ingress import IngressConfig, create_app
from engine.errors import BallonetError, EngineDeadError, OverloadedError, RequestError
from engine.messages import GenerateRequest, TokenDelta
from tests.unit.ingress_fakes import (
    END,
    FakeModel,
    Item,
    RecordingObserver,
    Script,
    byte_tokenizer,
    text_script,
)

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
CHAT_BODY: dict[str, Any] = {"model": "org/tiny", "messages": [{"role": "user", "content": "hi"}]}
BODY: dict[str, Any] = {"model": "org/tiny", "prompt": "hi"}


def app_of(model: FakeModel, config: IngressConfig | None = None, observer: Any = None) -> FastAPI:
    return create_app({model.model_id: model}, config, observer)


def post(model: FakeModel, path: str, body: dict[str, Any], **headers: str) -> Any:
    with TestClient(app_of(model)) as client:
        return client.post(path, json=body, headers=headers)


def events(response: Any) -> list[Any]:
    """The JSON of each event; the stream must end with [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def usage(prompt: int, output: int) -> dict[str, Any]:
    """The usage object where nothing was cached."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def failing(error: Exception, after: str = "") -> Script:
    def play(request: GenerateRequest) -> Iterable[Item]:
        for byte in after.encode():
            yield TokenDelta(request.request_id, (byte,))
        yield error

    return play


def test_chat_answer() -> None:
    answer = post(FakeModel(), CHAT, CHAT_BODY, **{"x-request-id": "abc"}).json()
    assert answer.pop("created") > 1_700_000_000
    assert answer == {
        "id": "chatcmpl-abc",
        "object": "chat.completion",
        "model": "org/tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello world", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": usage(20, 12),
    }


def test_completion_of_several_prompts_with_echo() -> None:
    def play(request: GenerateRequest) -> Iterable[Item]:
        return text_script(f"<{bytes(request.prompt_token_ids).decode()}>", finish="length")(request)

    body = {**BODY, "prompt": ["a", "bc"], "n": 2, "echo": True}
    answer = post(FakeModel(play), COMPLETIONS, body).json()
    assert answer["object"] == "text_completion"
    choices = [(choice["index"], choice["text"], choice["finish_reason"]) for choice in answer["choices"]]
    assert choices == [
        (0, "a<a>", "length"),
        (1, "a<a>", "length"),
        (2, "bc<bc>", "length"),
        (3, "bc<bc>", "length"),
    ]
    assert answer["usage"] == usage(3, 14)


@pytest.mark.parametrize("prompt", [[104, 105], [[104, 105]], ["hi"]])
def test_prompts_in_every_shape(prompt: Any) -> None:
    model = FakeModel(text_script("!"))
    answer = post(model, COMPLETIONS, {**BODY, "prompt": prompt, "echo": True}).json()
    assert answer["choices"][0]["text"] == "hi!"
    assert model.requests[0].prompt_token_ids == (104, 105)


def test_long_prompts_are_tokenised_in_a_thread_with_the_same_result() -> None:
    error = post(FakeModel(), COMPLETIONS, {**BODY, "prompt": "x" * 20_000}).json()["error"]
    assert "has 20000" in error["message"]


def test_chat_stream() -> None:
    model = FakeModel(text_script("Hé!", size=2))
    body = {**CHAT_BODY, "stream": True, "stream_options": {"include_usage": True}}
    response = post(model, CHAT, body)
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    chunks = events(response)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [(chunk["choices"][0]["delta"], chunk["choices"][0]["finish_reason"]) for chunk in chunks[:-1]]
    assert deltas == [
        ({"role": "assistant", "content": ""}, None),
        ({"content": "H"}, None),
        ({"content": "é!"}, None),
        ({}, "stop"),
    ]
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 4
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == usage(20, 5)


def test_stream_without_usage_does_not_mention_it() -> None:
    assert all(
        "usage" not in chunk for chunk in events(post(FakeModel(), CHAT, {**CHAT_BODY, "stream": True}))
    )


def test_completion_stream_with_echo() -> None:
    chunks = events(post(FakeModel(text_script("ab")), COMPLETIONS, {**BODY, "stream": True, "echo": True}))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["hi", "a", "b", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]


@pytest.mark.parametrize("stream", [False, True])
def test_choices_run_side_by_side(stream: bool) -> None:
    model = FakeModel(text_script("abc"))
    response = post(model, CHAT, {**CHAT_BODY, "n": 3, "stream": stream})
    texts = ["", "", ""]
    if stream:
        chunks = [chunk["choices"][0] for chunk in events(response)]
        assert {chunk["index"] for chunk in chunks[:6]} == {0, 1, 2}  # interleaved
        for chunk in chunks:
            texts[chunk["index"]] += chunk["delta"].get("content", "")
        roles = [chunk["index"] for chunk in chunks if "role" in chunk["delta"]]
        assert sorted(roles) == [0, 1, 2]
    else:
        texts = [choice["message"]["content"] for choice in response.json()["choices"]]
    assert texts == ["abc"] * 3
    assert len(set(model.closed)) == 3


def test_when_one_choice_fails_the_others_are_closed() -> None:
    def play(request: GenerateRequest) -> Iterable[Item]:
        if request.request_id.endswith("-1"):
            return failing(OverloadedError("queue full", 2.2), after="a")(request)
        return text_script("x" * 100_000)(request)

    model = FakeModel(play)
    response = post(model, COMPLETIONS, {**BODY, "n": 3})
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")
    assert sorted(model.closed) == sorted(request.request_id for request in model.requests)
    assert model.num_yielded < 1000


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("size", [1, 3, 50])
def test_stop_string_ends_the_engine_request(stream: bool, size: int) -> None:
    model = FakeModel(text_script("one\n\ntwo" + "x" * 50, size=size))
    body = {**BODY, "stop": ["\n\n", "zzz"], "stream": stream, "max_tokens": 100}
    if stream:
        body["stream_options"] = {"include_usage": True}
    response = post(model, COMPLETIONS, body)
    parts = events(response) if stream else [response.json()]
    choices = [part["choices"][0] for part in parts if part["choices"]]
    assert "".join(choice["text"] for choice in choices) == "one"
    assert choices[-1]["finish_reason"] == "stop"
    assert parts[-1]["usage"]["completion_tokens"] == 5
    assert model.closed == [model.requests[0].request_id]
    assert model.num_yielded == -(-5 // size)


def test_chat_logprobs() -> None:
    model = FakeModel(text_script("é"))
    body = {**CHAT_BODY, "logprobs": True, "top_logprobs": 3}
    answer = post(model, CHAT, body).json()
    first, second = answer["choices"][0]["logprobs"]["content"]  # none for the end token, which is no text
    assert (first["bytes"], second["bytes"]) == ([0xC3], [0xA9])
    assert first["logprob"] == -0.5
    top = [(token["token"], token["logprob"], token["bytes"]) for token in first["top_logprobs"]]
    assert top == [("�", -0.5, [0xC3]), ("X", -2.0, [88]), ("Y", -9999.0, [89])]
    chunks = events(post(model, CHAT, {**body, "stream": True}))
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [item["content"] for item in streamed if item] == [[first], [second]]


def test_chat_logprobs_without_alternatives() -> None:
    answer = post(FakeModel(text_script("a")), CHAT, {**CHAT_BODY, "logprobs": True}).json()
    (entry,) = answer["choices"][0]["logprobs"]["content"]
    assert entry == {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}


def test_completion_logprobs() -> None:
    answer = post(FakeModel(text_script("éa")), COMPLETIONS, {**BODY, "logprobs": 2}).json()
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["�", "�", "a"],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "top_logprobs": [{"�": -0.5, "X": -2.0}, {"�": -0.5, "X": -2.0}, {"a": -0.5, "X": -2.0}],
        "text_offset": [0, 0, 1],
    }


ERRORS: list[tuple[Exception, int, str | None]] = [
    (RequestError("no", "prompt", "context_length_exceeded"), 400, "context_length_exceeded"),
    (OverloadedError("full", 0.2), 429, "overloaded"),
    (EngineDeadError("gone"), 503, "engine_unavailable"),
    (BallonetError("bad luck"), 500, "engine_error"),
    (KeyError("secret"), 500, None),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "code"), ERRORS, ids=lambda value: type(value).__name__)
def test_errors_before_the_first_token_are_statuses(
    stream: bool, error: Exception, status: int, code: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    observer = RecordingObserver()
    model = FakeModel(failing(error))
    with TestClient(app_of(model, observer=observer)) as client:
        response = client.post(COMPLETIONS, json={**BODY, "stream": stream}, headers={"x-request-id": "r1"})
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert "secret" not in response.text
    assert ("rejected", "org/tiny", status) in observer.events
    assert ("finished", "org/tiny", "error", 2, 0) in observer.events
    logged = [record for record in caplog.records if record.name == "ballonet.ingress"]
    assert len(logged) == (1 if status >= 500 else 0)
    assert all(bool(record.exc_info) == isinstance(error, KeyError) for record in logged)
    assert all("r1" in record.getMessage() for record in logged)


@pytest.mark.parametrize(("error", "status", "code"), ERRORS, ids=lambda value: type(value).__name__)
def test_errors_in_a_stream_are_events(error: Exception, status: int, code: str | None) -> None:
    model = FakeModel(failing(error, after="ab"))
    *chunks, last = events(post(model, COMPLETIONS, {**BODY, "stream": True}))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", "b"]
    assert last["error"].keys() == {"message", "type", "param", "code"}
    assert last["error"]["code"] == code
    assert "secret" not in last["error"]["message"]


def test_a_request_the_engine_fails_is_a_server_error() -> None:
    model = FakeModel(text_script("", finish="error", error="out of memory"))
    response = post(model, CHAT, CHAT_BODY)
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "out of memory"
    assert post(FakeModel(text_script("", finish="cancelled")), CHAT, CHAT_BODY).status_code == 503
    assert post(FakeModel(lambda request: []), CHAT, CHAT_BODY).status_code == 503
    stream = post(
        FakeModel(text_script("ab", finish="error", error="bang")), CHAT, {**CHAT_BODY, "stream": True}
    )
    assert events(stream)[-1]["error"]["message"] == "bang"


def test_observer_hears_of_a_request() -> None:
    observer = RecordingObserver()
    with TestClient(app_of(FakeModel(text_script("abc", size=2)), observer=observer)) as client:
        client.post(COMPLETIONS, json=BODY)
        client.post(COMPLETIONS, json={**BODY, "n": 0})
        client.post(COMPLETIONS, json={**BODY, "model": "other"})
    assert observer.events == [
        ("started", "org/tiny"),
        ("first", "org/tiny"),
        ("inter", "org/tiny", 2),
        ("finished", "org/tiny", "stop", 2, 4),
        ("rejected", "", 400),
        ("rejected", "", 404),
    ]


def test_unknown_model_is_told_the_available_ones() -> None:
    response = post(FakeModel(), CHAT, {**CHAT_BODY, "model": "gpt-4"})
    assert response.status_code == 404
    error = response.json()["error"]
    assert error["code"] == "model_not_found"
    assert "'gpt-4'" in error["message"]
    assert "org/tiny" in error["message"]


def test_unknown_paths_and_wrong_methods_have_the_same_shape() -> None:
    with TestClient(app_of(FakeModel())) as client:
        missing, wrong = client.get("/v1/nothing"), client.get(CHAT)
    assert (missing.status_code, wrong.status_code) == (404, 405)
    assert missing.json()["error"]["message"] == "no such path: GET /v1/nothing"
    assert wrong.json()["error"]["type"] == "invalid_request_error"
    assert wrong.headers["allow"] == "POST"


def test_keys_guard_everything_but_probes() -> None:
    with TestClient(app_of(FakeModel(), IngressConfig(api_keys=("sesame", "clé")))) as client:
        for path in ("/health", "/version"):
            assert client.get(path).status_code == 200
        for value in (None, "Bearer", "Bearer wrong", "Basic sesame", "Bearer sesame2", "sesame"):
            headers = {} if value is None else {"authorization": value}
            response = client.get("/v1/models", headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["x-request-id"]
        assert client.post(CHAT, json=CHAT_BODY).status_code == 401
        assert client.get("/status").status_code == 401
        assert client.get("/nothing").status_code == 401
        for value in ("Bearer sesame", "bearer sesame", "Bearer clé".encode()):
            assert client.get("/v1/models", headers={"authorization": value}).status_code == 200


def test_probes_stay_open_below_a_route_prefix() -> None:
    config = IngressConfig(api_keys=("sesame",))
    for root_path, prefix in (("/llm", "/llm"), ("/", "")):
        with TestClient(app_of(FakeModel(), config), root_path=root_path) as client:
            assert client.get(f"{prefix}/health").status_code == 200
            assert client.get(f"{prefix}/v1/models").status_code == 401


def test_request_ids() -> None:
    model = FakeModel()
    with TestClient(app_of(model)) as client:
        given = [
            client.post(COMPLETIONS, json={**BODY, "n": 2}, headers={"x-request-id": "a:b-1"})
            for _ in range(2)
        ]
        insane = client.post(COMPLETIONS, json=BODY, headers={"x-request-id": "x" * 129})
        strange = client.get("/version", headers={"x-request-id": "a b"})
        missing = client.get("/nothing", headers={"x-request-id": "here"})
    assert [response.headers["x-request-id"] for response in given] == ["a:b-1", "a:b-1"]
    assert missing.headers["x-request-id"] == "here"
    assert len(insane.headers["x-request-id"]) == 32
    assert strange.headers["x-request-id"] != "a b"
    ids = [request.request_id for request in model.requests]
    assert len(set(ids)) == 5  # although two HTTP requests gave the same id
    assert all(request_id.startswith("a:b-1-") for request_id in ids[:4])


def test_models() -> None:
    away = FakeModel(model_id="other", info_error=EngineDeadError("gone"))
    app = create_app({"org/tiny": FakeModel(), "other": away})
    with TestClient(app) as client:
        listed = client.get("/v1/models").json()
        one = client.get("/v1/models/org/tiny").json()
        missing = client.get("/v1/models/org/none")
    assert listed == {
        "object": "list",
        "data": [
            one,
            {**one, "id": "other", "max_model_len": None},
        ],
    }
    assert one == {
        "id": "org/tiny",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "ballonet",
        "max_model_len": 200,
    }
    assert missing.status_code == 404


def test_health_needs_every_model() -> None:
    good, bad = FakeModel(), FakeModel(model_id="other")
    with TestClient(create_app({"org/tiny": good, "other": bad})) as client:
        assert client.get("/health").status_code == 200
        assert client.head("/health").status_code == 200
        bad.is_up = False
        assert client.get("/health").status_code == 503
        assert client.get("/version").json()["version"]


def test_status_is_raw() -> None:
    away = FakeModel(model_id="other", info_error=EngineDeadError("gone"))
    with TestClient(create_app({"org/tiny": FakeModel(), "other": away})) as client:
        first, second = client.get("/status").json()["models"]
    (engine,) = first["engines"]
    assert (engine["memory"]["kv"], engine["memory"]["cached"]) == (3, 1)
    assert engine["memory"]["weight_bytes"] == 9
    assert (engine["prefix_queries"], engine["prefix_hits"]) == (8, 6)
    assert engine["finished"] == [["stop", 1]]
    assert (second["model_id"], second["engines"]) == ("other", [])
    assert "gone" in second["error"]


def test_tokenize_and_detokenize() -> None:
    with TestClient(app_of(FakeModel())) as client:
        plain = client.post("/tokenize", json={"prompt": "hé", "return_token_strs": True}).json()
        chat = client.post("/tokenize", json={"model": "org/tiny", "messages": CHAT_BODY["messages"]}).json()
        back = client.post("/detokenize", json={"model": "org/tiny", "tokens": [*b"hi", END]}).json()
        both = client.post("/tokenize", json={"prompt": "x", "messages": CHAT_BODY["messages"]})
        neither = client.post("/tokenize", json={})
        wrong = client.post("/detokenize", json={"tokens": [-1]})
        other = client.post("/tokenize", json={"prompt": "x", "model": "other"})
    assert plain == {
        "count": 3,
        "max_model_len": 200,
        "tokens": [104, 0xC3, 0xA9],
        "token_strs": ["h", "�", "�"],
    }
    assert byte_tokenizer().decode(chat["tokens"]) == "user:hiassistant:"
    assert (chat["count"], chat["token_strs"]) == (20, None)
    assert back == {"prompt": "hi<|end|>"}
    assert [response.status_code for response in (both, neither, wrong, other)] == [400, 400, 400, 404]


def test_no_log_line_for_foreseen_errors(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ballonet"):
        post(FakeModel(), CHAT, {**CHAT_BODY, "n": 0})
    assert [record for record in caplog.records if record.name.startswith("ballonet")] == []
