"""What a request says about its own urgency: objectives in headers, `priority` in the body."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from cluster.ingress import create_app
from tests.unit.ingress_fakes import FakeModel, RecordingObserver

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "org/tiny", "messages": [{"role": "user", "content": "hi"}]},
    COMPLETIONS: {"model": "org/tiny", "prompt": "hi"},
}
TTFT, TPOT = "x-slo-ttft-ms", "x-slo-tpot-ms"
DEPOSIT = "x-slo-deposit"
Headers = dict[str, str] | list[tuple[str, str]]


def post(model: FakeModel, path: str, headers: Headers, observer: Any = None, **fields: Any) -> Any:
    with TestClient(create_app({model.model_id: model}, observer=observer)) as client:
        return client.post(path, json=BODIES[path] | fields, headers=headers)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_request_without_wishes_leaves_them_to_the_model(path: str) -> None:
    model = FakeModel()
    assert post(model, path, {}).status_code == 200
    (request,) = model.requests
    assert (request.ttft_slo_s, request.tpot_slo_s, request.priority) == (None, None, 0)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [False, True])
def test_wishes_reach_the_engine_with_every_choice(path: str, stream: bool) -> None:
    model = FakeModel()
    headers: Headers = {"X-SLO-TTFT-ms": "1500", TPOT: "62.5"}
    assert post(model, path, headers, n=2, stream=stream, priority=-3).status_code == 200
    wishes = [(request.ttft_slo_s, request.tpot_slo_s, request.priority) for request in model.requests]
    assert wishes == [(1.5, 0.0625, -3)] * 2


def test_one_objective_may_come_alone() -> None:
    model = FakeModel()
    for name in (TTFT, TPOT):
        assert post(model, COMPLETIONS, {name: "250"}).status_code == 200
    assert [(request.ttft_slo_s, request.tpot_slo_s) for request in model.requests] == [
        (0.25, None),
        (None, 0.25),
    ]


@pytest.mark.parametrize(
    ("value", "seconds"), [("1", 0.001), ("0.5", 0.0005), ("2e3", 2.0), ("5E+2", 0.5), (" 40 ", 0.04)]
)
def test_numbers_as_clients_write_them(value: str, seconds: float) -> None:
    model = FakeModel()
    assert post(model, COMPLETIONS, {TTFT: value}).status_code == 200
    assert model.requests[0].ttft_slo_s == pytest.approx(seconds)


NO_NUMBERS = ["", " ", "0", "0.0", "-5", "abc", "500ms", "1,5", "1_000", "0x10", ".", "1e", "1 2"]
NOT_FINITE = ["nan", "inf", "Infinity", "1e999", "1e-400", "9" * 400]  # or nothing is left of them as a float


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("name", [TTFT, TPOT])
@pytest.mark.parametrize("value", NO_NUMBERS + NOT_FINITE, ids=lambda value: value[:12])
def test_other_objectives_are_refused_by_name(path: str, name: str, value: str) -> None:
    model, observer = FakeModel(), RecordingObserver()
    response = post(model, path, {name: value}, observer)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", name)
    assert f"{name} must be a positive number of milliseconds" in error["message"]
    assert len(error["message"]) < 200
    assert model.requests == []
    assert observer.events == [("rejected", "org/tiny", 400)]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(("value", "unpaced"), [(None, False), ("on", False), ("off", True), (" OFF ", True)])
def test_tokens_may_be_wanted_as_soon_as_they_exist(path: str, value: str | None, unpaced: bool) -> None:
    model = FakeModel()
    assert post(model, path, {} if value is None else {DEPOSIT: value}, n=2).status_code == 200
    assert [request.unpaced for request in model.requests] == [unpaced] * 2


@pytest.mark.parametrize("value", ["", "0", "false", "on, off", "x" * 200])
def test_another_word_for_that_is_refused(value: str) -> None:
    model = FakeModel()
    response = post(model, COMPLETIONS, {DEPOSIT: value})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == DEPOSIT
    assert f"{DEPOSIT} must be on or off" in error["message"]
    assert len(error["message"]) < 200
    assert model.requests == []


def test_an_objective_sent_twice_is_refused() -> None:
    """Which one holds would be the guess of whoever reads it: a proxy in front may take the other."""
    response = post(FakeModel(), COMPLETIONS, [(TPOT, "20"), (TPOT, "50")])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == TPOT
    assert "'20, 50'" in response.json()["error"]["message"]


@pytest.mark.parametrize("priority", [-1000, -1, 0, 7, 1000])
def test_priorities_reach_the_engine(priority: int) -> None:
    model = FakeModel()
    assert post(model, CHAT, {}, priority=priority).status_code == 200
    assert model.requests[0].priority == priority


def test_the_range_of_priorities_is_told() -> None:
    for priority, bound in ((1001, "less than or equal to 1000"), (-1001, "greater than or equal to -1000")):
        error = post(FakeModel(), CHAT, {}, priority=priority).json()["error"]
        assert error["param"] == "priority"
        assert bound in error["message"]
