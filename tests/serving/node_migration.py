"""A stream that moves from a node to another, which share no memory: told as one JSON line.

In a process of its own (`python -m tests.serving.node_migration TOKENIZER FOLDER FILE`), because one process
has one Ray. Each node has room for one group, and the second a /dev/shm of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster

from cluster import launch
from cluster.app import build
from cluster.client import Client
from tests.serving.conftest import ROOT, free_port, serve_file
from tests.serving.processes import eventually
from tests.serving.test_migration import MODEL, PATIENCE_S, Reader, engines, move_any, movers

_START = "mount -t tmpfs tmpfs /dev/shm && exec {ray} start --block --address={address} {options}"
_OPTIONS = "--num-cpus=4 --resources='{\"room\": 1}' --object-store-memory=80000000 --disable-usage-stats"


@contextmanager
def _second_node(address: str) -> Iterator[None]:
    command = _START.format(ray=Path(sys.executable).parent / "ray", address=address, options=_OPTIONS)
    node = subprocess.Popen(
        ["unshare", "-Urm", "--kill-child", "sh", "-c", command], stdout=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        node.kill()  # and all that it started, with its namespace
        node.wait()


def _deploy(tokenizer: Path, folder: Path, port: int) -> None:
    room = {"bundle_per_worker": {"CPU": 0.5, "room": 1}}
    entry = movers(folder, tokenizer, placement_group_config=room)
    file = serve_file(port, "moving", "/moving", entry)
    (application,) = file.applications
    serve.start(proxy_location="HeadOnly", http_options=file.http_options.model_dump(exclude_none=True))
    target = serve.RunTarget(
        build(application.args.model_dump(mode="json")), name="moving", route_prefix="/moving"
    )
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)


def _move(url: str) -> dict[str, Any]:
    memories = [
        ray.get(engine.__ray_call__.remote(lambda self: os.stat("/dev/shm").st_dev), timeout=60)
        for _, engine in engines().values()
    ]
    readers = [Reader(url, number) for number in range(10)]
    moved, _ = move_any(readers)
    at = len(moved.text)
    for one in readers:
        one.join(PATIENCE_S)
    alone = Reader(url, moved.number)
    alone.join(PATIENCE_S)
    return {
        "memories": len(set(memories)),
        "at": at,
        "characters": len(moved.text),
        "is_same": moved.text == alone.text,
        "errors": [error for one in readers for error in one.errors],
    }


def main() -> None:
    tokenizer, folder, told_at = map(Path, sys.argv[1:])
    os.environ["PYTHONPATH"] = str(ROOT)
    launch.wait_for_slow_proxies()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "resources": {"room": 1}})
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        with _second_node(cluster.address):
            port = free_port()
            _deploy(tokenizer, folder, port)
            url = f"http://127.0.0.1:{port}/moving"
            eventually(lambda: len(Client(url).status()[MODEL]) == 2, PATIENCE_S)
            told_at.write_text(json.dumps(_move(url)))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
