"""POST /trim: who may, what is asked of the engines, and what is told of those that did not."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from cluster.ingress import IngressConfig, create_app
from engine.errors import EngineDeadError
from tests.unit.ingress_fakes import FakeModel

ADMIN = IngressConfig(api_keys=("tenant",), admin_api_keys=("root",))


def trim(*models: FakeModel, config: IngressConfig = ADMIN, key: str = "root", **request: Any) -> Any:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    url = request.pop("url", "/trim")
    with TestClient(create_app({model.model_id: model for model in models}, config)) as client:
        return client.post(url, headers=headers, **request)


def test_every_engine_of_every_model_is_asked() -> None:
    one, two = FakeModel(released=[5, 0]), FakeModel(model_id="b", released=[7])
    response = trim(one, two)
    assert response.status_code == 200
    assert response.json() == {
        "models": [
            {
                "model_id": "org/tiny",
                "engines": [{"released_bytes": 5, "error": None}, {"released_bytes": 0, "error": None}],
            },
            {"model_id": "b", "engines": [{"released_bytes": 7, "error": None}]},
        ]
    }
    assert one.trims == two.trims == [False]


def test_one_model_and_its_cache() -> None:
    one, two = FakeModel(), FakeModel(model_id="b")
    answer = trim(one, two, json={"model": "b", "drop_cache": True}).json()
    assert [model["model_id"] for model in answer["models"]] == ["b"]
    assert (one.trims, two.trims) == ([], [True])


@pytest.mark.parametrize(
    ("config", "key", "status"),
    [
        (ADMIN, "", 401),
        (ADMIN, "wrong", 401),
        (ADMIN, "tenant", 403),
        (IngressConfig(), "", 403),
        (IngressConfig(api_keys=("tenant",)), "tenant", 403),
        (IngressConfig(admin_api_keys=("root",)), "", 403),
        (IngressConfig(admin_api_keys=("root",)), "root", 200),
    ],
)
def test_only_an_admin_key_opens_it(config: IngressConfig, key: str, status: int) -> None:
    model = FakeModel()
    response = trim(model, config=config, key=key)
    assert response.status_code == status
    assert model.trims == ([False] if status == 200 else [])
    if status == 403:
        assert response.json()["error"]["code"] == "admin_key_required"
        assert "ingress.admin_api_keys_env" in response.json()["error"]["message"]


def test_an_admin_key_opens_everything_else_and_closes_nothing() -> None:
    model = FakeModel()
    with TestClient(create_app({model.model_id: model}, ADMIN)) as client:
        for key, status in (("root", 200), ("tenant", 200), ("wrong", 401)):
            headers = {"authorization": f"Bearer {key}"}
            assert client.get("/v1/models", headers=headers).status_code == status
    with TestClient(create_app({model.model_id: model}, IngressConfig(admin_api_keys=("root",)))) as client:
        assert client.get("/v1/models").status_code == 200


@pytest.mark.parametrize(
    ("request_of", "param"),
    [
        ({"json": {"drop_caches": True}}, "drop_caches"),
        ({"json": {"drop_cache": "yes"}}, "drop_cache"),
        ({"content": b"[]"}, None),
        ({"url": "/trim?drop_cache=true"}, None),
    ],
)
def test_what_is_not_understood_is_refused(request_of: dict[str, Any], param: str | None) -> None:
    model = FakeModel()
    response = trim(model, **request_of)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert model.trims == []


def test_an_unknown_model_is_none() -> None:
    assert trim(FakeModel(), json={"model": "b"}).status_code == 404


def test_an_engine_that_fails_is_an_error_beside_what_the_others_gave() -> None:
    response = trim(FakeModel(released=[EngineDeadError("it ended"), 9]))
    assert response.status_code == 503
    body = response.json()
    assert body["models"][0]["engines"] == [
        {"released_bytes": None, "error": "it ended"},
        {"released_bytes": 9, "error": None},
    ]
    assert body["error"]["message"] == "1 of 2 engines failed"


def test_a_model_without_engines_is_an_error() -> None:
    response = trim(FakeModel(), FakeModel(model_id="b", released=[]))
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "no engine of b answers"
