"""A Ray cluster of two nodes on this machine, of which one is killed under load: told as one JSON line.

In a process of its own (`python -m tests.serving.node_loss TOKENIZER`), because one process has one Ray.
Each node has room for one group.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve
from ray.cluster_utils import Cluster

from cluster import launch
from cluster.client import Client
from tests.serving.conftest import ROOT, build_fake, free_port, llm, serve_file
from tests.serving.fake_engine import QUICK, SLOW
from tests.serving.processes import descendants, eventually

ROUTE = "/"
NUM_TOKENS = 99  # 50 ms apart; the fake has no words for more


def _ask(url: str, order: int, num_tokens: int) -> tuple[str, float]:
    """How a stream ended, and when."""
    body = {"model": "two", "prompt": [order], "max_tokens": num_tokens, "stream": True}
    text = httpx.post(f"{url}/v1/completions", json=body, timeout=120).text
    if '"error"' in text:
        how = "engine_unavailable" if "engine_unavailable" in text else text[-300:]
    else:
        how = "whole" if text.count("word") == num_tokens else text[-300:]
    return how, time.monotonic()


def _deploy(tokenizer: Path, port: int) -> None:
    entry = llm(
        "two",
        tokenizer,
        tokenizer,
        deployment_config={"num_replicas": 2},
        placement_group_config={"bundle_per_worker": {"CPU": 0.5, "room": 1}},
    )
    file = serve_file(port, "two", ROUTE, entry)
    (application,) = file.applications
    serve.start(proxy_location="HeadOnly", http_options=file.http_options.model_dump(exclude_none=True))
    target = serve.RunTarget(
        build_fake(application.args.model_dump(mode="json")), name="two", route_prefix=ROUTE
    )
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def _lose(cluster: Cluster, node: Any, url: str) -> dict[str, Any]:
    """Streams on both nodes, one of which goes."""

    def running() -> list[int]:
        return [group.num_running for group in Client(url).status()["two"]]

    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(_ask, url, SLOW, NUM_TOKENS) for _ in range(6)]
        eventually(lambda: len(running()) == 2 and sum(running()) == 6 and min(running()) >= 1)
        raylet = node.all_processes["raylet"][0].process.pid
        killed_s = time.monotonic()
        for pid in [raylet, *descendants(raylet)]:
            os.kill(pid, signal.SIGKILL)
        quick = [_ask(url, QUICK, 3)[0] for _ in range(10)]
        answered_s = time.monotonic()
        ends = [stream.result(120) for stream in streams]
    failed = [end_s - killed_s for how, end_s in ends if how == "engine_unavailable"]
    cluster.add_node(num_cpus=1, resources={"room": 1})
    added_s = time.monotonic()
    eventually(lambda: len(running()) == 2, 120)
    return {
        "ends": sorted(how for how, _ in ends),
        "quick": sorted(set(quick)),
        "streams_ended_s": max(failed, default=None),
        "quick_s": answered_s - killed_s,
        "rebuilt_s": time.monotonic() - added_s,
    }


def main() -> None:
    os.environ["PYTHONPATH"] = str(ROOT)
    launch.wait_for_slow_proxies()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "resources": {"room": 1}})
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        _deploy(Path(sys.argv[1]), port)
        eventually(lambda: len(Client(url).status()["two"]) == 1, 120)
        node = cluster.add_node(num_cpus=1, resources={"room": 1})
        eventually(lambda: len(Client(url).status()["two"]) == 2, 120)
        Path(sys.argv[2]).write_text(json.dumps(_lose(cluster, node, url)))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
