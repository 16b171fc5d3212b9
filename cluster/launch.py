"""Bringing applications up on Ray and down again: what `ballonet serve` does between config and prompt.

Owns the local Ray it starts. Knows no terminal; progress is reported through a callback.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import serve

from cluster.app import build
from cluster.config import LLMConfig, ServeFile
from cluster.gpu_needs import shortage
from engine.errors import BallonetError, ConfigError

Progress = Callable[[str], None]
BuildApplication = Callable[[dict[str, Any]], serve.Application]

_POLL_S = 0.25
_WORDS = {"UPDATING": "starting", "HEALTHY": "ready"}  # Serve's words for a first deployment mislead
# How Ray renders one of our errors at the end of a traceback, whatever surrounds it.
_OUR_ERROR = re.compile(r"engine\.errors\.\w+: (.+?)(?=\n\s*\n|\n\x1b|\n\S*Traceback|\Z)", re.DOTALL)


class DeployError(BallonetError):
    """An application did not come up; the message says why, in one piece."""


def require_models(file: ServeFile) -> None:
    """Raises ConfigError when a model is a path of this machine and is not there."""
    for application in file.applications:
        for llm in application.args.llm_configs:
            _require_model(llm)


def require_port(file: ServeFile) -> None:
    """Raises ConfigError when another process listens on the file's port."""
    host, port = file.http_options.host, file.http_options.port
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"port {port} on {host} cannot be used ({error.strerror}); "
                "stop the other server or change http_options.port"
            ) from error


def require_gpus(file: ServeFile) -> None:
    """Raises ConfigError when a Ray of this machine alone lacks GPUs that the file's first groups need."""
    if lack := shortage(file, node_gpus()):
        raise ConfigError(
            f"{lack}; lower num_replicas, min_replicas or tensor_parallel_size, set engine_kwargs.device to "
            "cpu, or deploy on a Ray cluster that has them (--address)"
        )


def node_gpus() -> list[float]:
    """GPUs of each node of the cluster that is up, as Ray counts them."""
    return [node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]]


def _require_model(llm: LLMConfig) -> None:
    source = Path(llm.model_source)
    if not source.is_absolute() or source.exists():
        return
    remedy = "run `make model` to fetch it" if source.parent.name == "ballonet" else "check model_source"
    raise ConfigError(f"{llm.model_id}: there is no model at {source}; {remedy}")


def wait_for_slow_proxies() -> None:
    """To be called before Ray starts here: its processes take the setting over.

    Serve kills an HTTP proxy that is not up after 5 s, and `serve.start` fails with it; on two busy cores
    its imports alone take longer.
    """
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")


@contextmanager
def ray_running(address: str | None, verbose: bool) -> Iterator[None]:
    """A Ray to deploy on: one of our own on this machine, or the one at `address`.

    Ours ends with the block; Ray at an address only loses our connection.
    """
    if not address:
        wait_for_slow_proxies()
    # Ray and Serve narrate their start at INFO; the replicas' logs are in the session's directory.
    ray.init(
        address=address or "local",
        include_dashboard=None if address else False,
        logging_level=logging.INFO if verbose else logging.ERROR,
        log_to_driver=verbose,
    )
    if not verbose:
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def deployed(
    file: ServeFile, progress: Progress, build_one: BuildApplication = build, *, removes: bool = True
) -> Iterator[str]:
    """All applications of the file, up and healthy; the value is the server's URL.

    They are removed when the block ends, after requests in flight have finished (at most a minute).
    Without `removes` they are left to end with their Ray: whoever stops a process group, as systemd
    and `timeout` do, stops Ray's daemons beside us, and asking those for anything would hang.

    Raises:
        DeployError: one of them cannot start; nothing stays deployed.
    """
    options = file.http_options
    serve.start(
        proxy_location=file.proxy_location,
        http_options=options.model_dump(exclude_none=True),
        logging_config=file.logging_config,
    )
    names = [application.name for application in file.applications]
    is_up = False
    try:
        serve.run_many(
            [
                serve.RunTarget(
                    build_one(application.args.model_dump(mode="json")),
                    name=application.name,
                    route_prefix=application.route_prefix,
                )
                for application in file.applications
            ],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
        _wait(file, progress)
        is_up = True
        host = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
        yield f"http://{host}:{options.port}"
    finally:
        if removes:
            _remove(names, progress, waits=is_up)


def _remove(names: list[str], progress: Progress, waits: bool) -> None:
    """Without waiting where nothing serves yet: Serve does not finish deleting what it cannot place."""
    for name in names:
        try:
            serve.delete(name, _blocking=waits)
        except TimeoutError:
            progress(f"{name} still has open requests; Serve goes on removing it")


def _wait(file: ServeFile, progress: Progress) -> None:
    names = [application.name for application in file.applications]
    said: dict[str, str] = {}
    while True:
        # Serve says for 30 s nothing of what it cannot place, and then not what is lacking.
        lack = shortage(file, node_gpus())
        if lack and said.get("") != lack:
            said[""] = lack
            progress(f"waiting for nodes with GPUs: {lack}")
        applications = serve.status().applications
        statuses = [applications[name] for name in names if name in applications]
        for status in statuses:
            _raise_if_failed(status)
            for deployment, facts in status.deployments.items():
                # The message tells, for one, that no node has the resources that a replica asks for.
                words = _WORDS.get(facts.status.value, facts.status.value.lower())
                news = ": ".join(filter(None, (deployment, words, facts.message)))
                if said.get(deployment) != news:
                    said[deployment] = news
                    progress(news)
        if len(statuses) == len(names) and all(status.status == "RUNNING" for status in statuses):
            return
        time.sleep(_POLL_S)


def _raise_if_failed(status: Any) -> None:
    messages = [facts.message for facts in status.deployments.values()] + [status.message]
    for message in messages:
        # Our own errors come back at every try: no use in waiting for Serve's last one.
        if match := _OUR_ERROR.search(message or ""):
            raise DeployError(match[1].strip())
    if status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
        raise DeployError("\n".join(message for message in messages if message))
