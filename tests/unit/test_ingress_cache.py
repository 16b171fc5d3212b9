"""What a client sees and controls of the prefix cache: `cached_tokens`, `cache_salt`, salts by key."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from typing import Any

import pytest
from starlette.testclient import TestClient

from cluster.ingress import IngressConfig, create_app
from engine.messages import GenerateRequest
from tests.unit.ingress_fakes import FakeModel, Item, Script, text_script

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "org/tiny", "messages": [{"role": "user", "content": "hi"}]},
    COMPLETIONS: {"model": "org/tiny", "prompt": "hi"},
}
KEYS = ("key of tenant one", "key of tenant two")


def usage_of(model: FakeModel, path: str, **fields: Any) -> dict[str, Any]:
    """The usage of a whole answer or of a stream's last chunk."""
    with TestClient(create_app({model.model_id: model})) as client:
        response = client.post(path, json=BODIES[path] | fields)
    assert response.status_code == 200, response.text
    if not fields.get("stream"):
        return dict(response.json()["usage"])
    chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    return dict(chunks[-1]["usage"])


def cached_by_choice(*cached: int) -> Script:
    """Each choice, in the order of the answer, found another number of tokens."""

    def play(request: GenerateRequest) -> Iterable[Item]:
        return text_script("ab", cached=cached[int(request.request_id.rsplit("-", 1)[1])])(request)

    return play


STREAM = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [{}, STREAM], ids=["whole", "stream"])
@pytest.mark.parametrize("cached", [0, 1])
def test_cached_tokens_are_told(path: str, stream: dict[str, Any], cached: int) -> None:
    usage = usage_of(FakeModel(text_script("abc", cached=cached)), path, **stream)
    assert usage["prompt_tokens_details"] == {"cached_tokens": cached}
    assert usage["prompt_tokens"] == (20 if path == CHAT else 2)


@pytest.mark.parametrize("stream", [{}, STREAM], ids=["whole", "stream"])
def test_a_prompt_counts_once_however_many_choices_it_has(stream: dict[str, Any]) -> None:
    """The first choice computed all but 4 tokens, and its siblings found what it had computed."""
    usage = usage_of(FakeModel(cached_by_choice(4, 19, 19)), CHAT, n=3, **stream)
    assert (usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]) == (20, 4)


@pytest.mark.parametrize("stream", [{}, STREAM], ids=["whole", "stream"])
def test_cached_tokens_of_several_prompts_add_up(stream: dict[str, Any]) -> None:
    model = FakeModel(cached_by_choice(1, 2, 3, 5))
    usage = usage_of(model, COMPLETIONS, prompt=["abc", "defghi"], n=2, **stream)
    assert (usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]) == (9, 1 + 3)


def salts(bodies: list[tuple[dict[str, Any], str]], config: IngressConfig | None = None) -> list[str]:
    """The engine's salt for each (fields of a completion, key)."""
    model = FakeModel()
    with TestClient(create_app({model.model_id: model}, config)) as client:
        for fields, key in bodies:
            headers = {"authorization": f"Bearer {key}"} if key else {}
            response = client.post(COMPLETIONS, json=BODIES[COMPLETIONS] | fields, headers=headers)
            assert response.status_code == 200, response.text
    return [request.cache_salt for request in model.requests]


def test_without_salts_all_share() -> None:
    assert salts([({}, ""), ({"cache_salt": None}, "")]) == ["", ""]
    assert salts([({}, KEYS[0]), ({}, KEYS[1])], IngressConfig(api_keys=KEYS)) == ["", ""]


def test_a_clients_salt_reaches_every_choice_and_is_not_sent_on() -> None:
    one, again, other, second = salts(
        [({"cache_salt": "s3cret"}, ""), ({"cache_salt": "s3cret"}, ""), ({"cache_salt": "é", "n": 2}, "")]
    )
    assert one == again != other == second
    assert all(one and "s3cret" not in salt for salt in (one, other))


def test_salts_reach_the_engine_from_a_chat() -> None:
    model = FakeModel()
    with TestClient(create_app({model.model_id: model})) as client:
        client.post(CHAT, json=BODIES[CHAT] | {"cache_salt": "a"}).raise_for_status()
    assert model.requests[0].cache_salt


def test_salting_by_key_keeps_keys_apart_whatever_their_clients_send() -> None:
    config = IngressConfig(api_keys=KEYS, admin_api_keys=("root",), salts_by_api_key=True)
    fields: list[dict[str, Any]] = [{}, {"cache_salt": "a"}, {"cache_salt": "b"}]
    got = salts([(field, key) for key in (*KEYS, "root") for field in fields], config)
    assert len(set(got)) == 9
    assert "" not in got
    assert got[0] == salts([({}, KEYS[0])], config)[0]  # every ingress replica finds the same one


def test_a_key_shows_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    def fail(request: GenerateRequest) -> Iterable[Item]:
        yield KeyError("a fault nobody foresaw")

    model = FakeModel(fail)
    config = IngressConfig(api_keys=KEYS, salts_by_api_key=True)
    with caplog.at_level(logging.DEBUG), TestClient(create_app({model.model_id: model}, config)) as client:
        fields = BODIES[COMPLETIONS] | {"cache_salt": "the salt"}
        response = client.post(COMPLETIONS, json=fields, headers={"authorization": f"Bearer {KEYS[0]}"})
    assert response.status_code == 500
    assert "failed" in caplog.text
    for secret in (KEYS[0], "the salt"):
        assert secret not in caplog.text + response.text + repr(model.requests)
