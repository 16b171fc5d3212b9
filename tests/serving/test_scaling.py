"""The controller's wish for groups, as Serve carries it out: by fakes, and in seconds instead of minutes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster import launch
from cluster.client import Client
from tests.serving.conftest import build_fake, llm, serve_file
from tests.serving.fake_engine import SLOW
from tests.serving.processes import eventually

pytestmark = pytest.mark.ray

NUM_TOKENS = 40  # of each answer, 50 ms apart
AUTOSCALING = {
    "min_replicas": 1,
    "max_replicas": 2,
    "target_ongoing_requests": 1000,  # Serve's own rule would never ask for another
    "metrics_interval_s": 0.2,
    "look_back_period_s": 1.0,
    "upscale_delay_s": 0.2,
    "downscale_delay_s": 0.5,
}


def _ask(url: str, until: threading.Event) -> list[int]:
    """Answers one after the other, in tokens."""
    body = {"model": "scales", "prompt": [SLOW], "max_tokens": NUM_TOKENS, "stream": True}
    answers = []
    while not until.is_set():
        answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=120).text.count("word"))
    return answers


def test_serve_starts_the_group_that_the_controller_asks_for_and_gives_it_up(
    base_url: str, port: int, tokenizer_dir: Path, record_property: Callable[[str, Any], None]
) -> None:
    """More requests than a group can serve in time, and no host memory to help: one group more, until most of
    the load has gone."""
    entry = llm(
        "scales",
        tokenizer_dir,
        tokenizer_dir,
        engine_kwargs={"device": "cpu", "max_num_seqs": 2},
        deployment_config={"autoscaling_config": AUTOSCALING, "graceful_shutdown_timeout_s": 60.0},
    )
    file = serve_file(port, "scaling", "/scaling", entry, replica_patience_s=1.0, replica_idle_s=3.0)
    few, many = threading.Event(), threading.Event()
    with launch.deployed(file, print, build_fake) as root, ThreadPoolExecutor(6) as pool:
        url = f"{root}/scaling"

        def running() -> list[int]:
            return [group.num_running for group in Client(url).status()["scales"]]

        try:
            assert len(running()) == 1
            clients = [pool.submit(_ask, url, few if number == 0 else many) for number in range(6)]
            record_property("started_s", eventually(lambda: len(running()) == 2))
            eventually(lambda: min(running()) >= 1 and len(running()) == 2)
            many.set()
            record_property("given_up_s", eventually(lambda: len(running()) == 1))
        finally:
            few.set()
            many.set()
        answers = [answer for client in clients for answer in client.result(60)]
    assert set(answers) == {NUM_TOKENS}
