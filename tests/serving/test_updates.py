"""Groups and ingresses that come and go by plan: no request fails."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve

from cluster.client import Client
from tests.serving.conftest import build_fake, llm, serve_file
from tests.serving.fake_engine import SLOW
from tests.serving.processes import engines, eventually

pytestmark = pytest.mark.ray

NAME, ROUTE, GROUPS = "rolling", "/rolling", "rolling:TpGroup-rolling"
NUM_TOKENS = 30  # of each answer, 50 ms apart


class Load:
    """Clients that ask again and again, some of them for streams, until told to stop."""

    def __init__(self, url: str, num_clients: int = 4) -> None:
        self.outcomes: Counter[str] = Counter()
        self._url = url
        self._stop = threading.Event()
        self._clients = [threading.Thread(target=self._ask, args=(bool(n % 2),)) for n in range(num_clients)]

    def _ask(self, streams: bool) -> None:
        body = {"model": "rolling", "prompt": [SLOW], "max_tokens": NUM_TOKENS, "stream": streams}
        while not self._stop.is_set():
            try:
                answer = httpx.post(f"{self._url}/v1/completions", json=body, timeout=120)
                whole = answer.status_code == 200 and answer.text.count("word") == NUM_TOKENS
                self.outcomes["served" if whole else f"{answer.status_code} {answer.text[-300:]}"] += 1
            except httpx.HTTPError as error:
                self.outcomes[repr(error)] += 1

    @contextmanager
    def running(self) -> Iterator[None]:
        for client in self._clients:
            client.start()
        try:
            eventually(lambda: self.outcomes["served"] >= len(self._clients))
            yield
            before = self.outcomes["served"]
            eventually(lambda: self.outcomes["served"] >= before + len(self._clients))
        finally:
            self._stop.set()
            for client in self._clients:
                client.join(120)


def _deploy(tokenizer: Path, num_groups: int, max_num_seqs: int) -> None:
    """What `serve deploy` does with a file that has changed."""
    entry = llm(
        "rolling",
        tokenizer,
        tokenizer,
        engine_kwargs={"device": "cpu", "max_num_seqs": max_num_seqs},
        deployment_config={"num_replicas": num_groups, "graceful_shutdown_timeout_s": 60.0},
    )
    (application,) = serve_file(1, NAME, ROUTE, entry).applications
    serve.run(build_fake(application.args.model_dump(mode="json")), name=NAME, route_prefix=ROUTE)


def test_no_request_fails_while_groups_are_replaced_and_taken_away(
    base_url: str, port: int, tokenizer_dir: Path
) -> None:
    url = f"http://127.0.0.1:{port}{ROUTE}"
    _deploy(tokenizer_dir, 2, 8)
    try:
        first = set(engines(GROUPS))
        load = Load(url)
        with load.running():
            _deploy(tokenizer_dir, 2, 16)
            eventually(lambda: len(engines(GROUPS)) == 2 and not first & set(engines(GROUPS)))
            _deploy(tokenizer_dir, 1, 16)
            eventually(lambda: len(engines(GROUPS)) == 1)
        assert set(load.outcomes) == {"served"}
        assert len(Client(url).status()["rolling"]) == 1
    finally:
        serve.delete(NAME)


def test_what_has_begun_is_finished_when_an_application_goes(
    base_url: str, port: int, tokenizer_dir: Path
) -> None:
    url = f"http://127.0.0.1:{port}{ROUTE}"
    _deploy(tokenizer_dir, 1, 8)
    answers: list[Any] = []
    body = {"model": "rolling", "prompt": [SLOW], "max_tokens": 80, "stream": True}

    def ask() -> None:
        answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60).text)

    clients = [threading.Thread(target=ask) for _ in range(3)]
    for client in clients:
        client.start()
    eventually(lambda: Client(url).status()["rolling"][0].num_running == 3)
    started = time.monotonic()
    serve.delete(NAME)
    for client in clients:
        client.join(60)
    assert [answer.count("word") for answer in answers] == [80] * 3
    assert all(answer.endswith("data: [DONE]\n\n") for answer in answers)
    assert time.monotonic() - started < 60
