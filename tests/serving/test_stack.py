"""HTTP, Ray Serve and TP groups together; only the engine is a fake."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
from ray import serve

from cluster import launch
from cluster.client import Client, ClientError
from cluster.controller import ClusterView
from engine.messages import EngineSnapshot
from tests.serving.conftest import ADMIN_KEY, ROUTE, build_fake, llm, serve_file
from tests.serving.fake_engine import CHUNK_BYTES, FATAL, FULL, QUICK, SLOW, WRONG

pytestmark = pytest.mark.ray


def _body(order: int, max_tokens: int = 8, model: str = "fake", stream: bool = False) -> dict[str, Any]:
    return {"model": model, "prompt": [order], "max_tokens": max_tokens, "stream": stream}


def _eventually(holds: Callable[[], bool], within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def _engine(base_url: str, model: str = "fake") -> EngineSnapshot:
    (snapshot,) = Client(base_url).status()[model]
    return snapshot


def _cancelled(base_url: str, model: str = "fake") -> int:
    return dict(_engine(base_url, model).finished).get("cancelled", 0)  # type: ignore[call-overload]


def test_tokens_arrive_one_by_one(http: httpx.Client) -> None:
    started, arrivals = time.monotonic(), []
    with http.stream("POST", "/v1/completions", json=_body(SLOW, 10, stream=True)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                arrivals.append(time.monotonic() - started)
    assert len(arrivals) >= 10
    # The fake makes a token each 50 ms. Buffered anywhere, they would come together.
    assert arrivals[-1] - arrivals[0] > 0.3


def test_the_official_client(base_url: str) -> None:
    client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0)
    assert {model.id for model in client.models.list()} == {"fake", "narrow", "pair"}
    messages: Any = [{"role": "user", "content": "word1"}]
    whole = client.chat.completions.create(model="fake", messages=messages, max_tokens=3)
    assert (whole.choices[0].message.content or "").split() == ["word100", "word101", "word102"]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 3
    parts = client.chat.completions.create(model="fake", messages=messages, max_tokens=3, stream=True)
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text.split() == ["word100", "word101", "word102"]


@pytest.mark.parametrize("model", ["fake", "narrow"])
def test_a_client_that_leaves_cancels_in_the_engine(http: httpx.Client, base_url: str, model: str) -> None:
    before = _cancelled(base_url, model)
    with http.stream("POST", "/v1/completions", json=_body(SLOW, 400, model, stream=True)) as response:
        next(response.iter_lines())
    _eventually(lambda: _cancelled(base_url, model) > before and _engine(base_url, model).num_running == 0)


def test_a_client_that_leaves_without_a_stream_cancels_too(base_url: str) -> None:
    before = _cancelled(base_url)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{base_url}/v1/completions", json=_body(SLOW, 400), timeout=1.0)
    _eventually(lambda: _cancelled(base_url) > before and _engine(base_url).num_running == 0)


def test_what_the_engine_refuses_is_the_clients_status(http: httpx.Client) -> None:
    wrong = http.post("/v1/completions", json=_body(WRONG))
    assert wrong.status_code == 400
    assert wrong.json()["error"]["param"] == "prompt"
    assert wrong.json()["error"]["code"] == "bad_prompt"
    full = http.post("/v1/completions", json=_body(FULL))
    assert full.status_code == 429
    assert full.headers["retry-after"] == "7"
    assert "the queue is full" in full.json()["error"]["message"]


def test_more_than_the_groups_take_is_refused(base_url: str) -> None:
    def post(_: int) -> httpx.Response:
        return httpx.post(f"{base_url}/v1/completions", json=_body(SLOW, 10, "narrow"), timeout=30)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(post, range(8)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    refused = answers[statuses.index(429)]
    assert "full" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) >= 1


def test_two_groups_share_the_work(base_url: str) -> None:
    with ThreadPoolExecutor(6) as pool:
        for _ in range(6):
            body = _body(SLOW, 60, "pair")
            pool.submit(httpx.post, f"{base_url}/v1/completions", json=body, timeout=30)
        _eventually(lambda: sum(group.num_running for group in Client(base_url).status()["pair"]) == 6)
        shares = sorted(group.num_running for group in Client(base_url).status()["pair"])
    assert shares[0] >= 2


def test_our_own_client(base_url: str) -> None:
    pieces: list[str] = []
    client = Client(base_url)
    answer = client.chat("fake", [{"role": "user", "content": "word1"}], pieces.append, max_tokens=4)
    assert "".join(pieces) == answer.text
    assert answer.text.split() == ["word100", "word101", "word102", "word103"]
    assert (answer.completion_tokens, answer.finish_reason) == (4, "length")
    assert 0 < answer.ttft_s < answer.total_s
    with pytest.raises(ClientError, match="HTTP 404: the model 'other' does not exist"):
        client.chat("other", [{"role": "user", "content": "word1"}], pieces.append)


def test_cached_tokens_and_salts_go_through_everything(http: httpx.Client, base_url: str) -> None:
    def cached(**fields: Any) -> int:
        body = _body(QUICK, 2) | {"prompt": [QUICK, 7, 7, 7, 7]} | fields
        answer = http.post("/v1/completions", json=body).raise_for_status().json()
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert [cached(), cached(), cached(cache_salt="a"), cached(cache_salt="a")] == [0, 4, 0, 4]
    assert _engine(base_url).prefix_hits >= 8


def test_trimming_reaches_every_group_and_leaves_requests_alone(http: httpx.Client, base_url: str) -> None:
    admin = Client(base_url, ADMIN_KEY)

    def physical() -> list[int]:
        return sorted(group.memory.created for group in admin.status()["pair"])

    before = physical()
    with http.stream("POST", "/v1/completions", json=_body(SLOW, 40, "pair", stream=True)) as response:
        lines = response.iter_lines()
        next(lines)
        given = admin.trim("pair", drop_cache=True)["pair"]
        after = physical()
        rest = list(lines)
    assert "data: [DONE]" in rest
    assert after == [0, 1]  # the sequence that runs keeps its chunk
    assert sum(one for one in given if isinstance(one, int)) == (sum(before) - 1) * CHUNK_BYTES
    with pytest.raises(ClientError, match="HTTP 403: this route takes an admin key"):
        Client(base_url).trim("pair")


def test_trimming_tells_which_engine_failed(base_url: str) -> None:
    given = Client(base_url, ADMIN_KEY).trim()
    assert given["narrow"] == ["the step loop has ended"]
    assert [isinstance(one, int) for one in given["fake"] + given["pair"]] == [True] * 3


def test_the_controller_sees_every_group(base_url: str) -> None:
    handle = serve.get_deployment_handle("Controller", "fake")

    def view() -> ClusterView:
        seen: ClusterView = handle.latest.remote().result(timeout_s=5)
        return seen

    expected = {"fake": 1, "narrow": 1, "pair": 2}
    _eventually(lambda: {name: len(groups) for name, groups in view().groups.items()} == expected)
    first = view().taken_s
    _eventually(lambda: view().taken_s > first)


def test_metrics_reach_rays_endpoint(http: httpx.Client) -> None:
    http.post("/v1/completions", json=_body(QUICK)).raise_for_status()
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = [
        "ray_ballonet_time_to_first_token_seconds_bucket",
        "ray_ballonet_request_success_total",
        "ray_ballonet_num_requests_running",
        "ray_ballonet_memory_bytes",
        "ray_ballonet_controller_groups",
    ]
    _eventually(lambda: all(name in httpx.get(url).text for name in wanted), 30)
    line = next(
        line for line in httpx.get(url).text.splitlines() if line.startswith("ray_ballonet_memory_bytes{")
    )
    assert 'deployment="TpGroup-' in line
    assert 'model_name="' in line


def test_an_engine_that_dies_is_replaced(http: httpx.Client) -> None:
    with http.stream("POST", "/v1/completions", json=_body(FATAL, 5, stream=True)) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert "error" in json.loads(lines[-1][6:] if "[DONE]" not in lines[-1] else lines[-2][6:])
    _eventually(lambda: http.post("/v1/completions", json=_body(QUICK)).status_code == 200, 60)


def test_an_engine_that_cannot_start_is_one_message(base_url: str, port: int, tokenizer_dir: Path) -> None:
    file = serve_file(port, "broken", "/broken", llm("broken", "missing", tokenizer_dir))
    started = time.monotonic()
    with pytest.raises(launch.DeployError) as caught, launch.deployed(file, print, build_fake):
        pass
    assert str(caught.value) == "there is no model called missing"
    assert time.monotonic() - started < 30
    _eventually(lambda: "broken" not in serve.status().applications)
    assert ROUTE in base_url  # the other application is still there
    assert httpx.get(f"{base_url}/health").status_code == 200


def test_a_model_for_gpus_waits_for_their_nodes_and_says_so(
    base_url: str, port: int, tokenizer_dir: Path
) -> None:
    """Ray builds an application once its head is up; GPU nodes join later."""

    class WaitsError(Exception):
        pass

    def progress(text: str) -> None:
        if text.startswith("waiting for nodes with GPUs"):
            raise WaitsError(text)

    entry = llm("later", tokenizer_dir, tokenizer_dir, engine_kwargs={"device": "cuda"})
    file = serve_file(port, "later", "/later", entry)
    with pytest.raises(WaitsError, match="later 1; there: none"), launch.deployed(file, progress, build_fake):
        pass
    _eventually(lambda: "later" not in serve.status().applications)
    assert httpx.get(f"{base_url}/health").status_code == 200


def test_the_controller_is_obeyed_and_status_tells_its_orders(http: httpx.Client) -> None:
    """Orders travel through Serve to every group, and come back in the snapshots."""

    def orders() -> list[Any]:
        models = http.get("/status").json()["models"]
        return [engine["order"] for model in models for engine in model["engines"]]

    give_up = time.monotonic() + 60
    while not all(orders()) or len(orders()) < 4:
        assert time.monotonic() < give_up
        time.sleep(0.2)
    assert all(order["epoch"] >= 1 and order["admission_weight"] == 1.0 for order in orders())
