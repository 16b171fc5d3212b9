"""How Ray Serve carries HTTP on a Ray of our own: environment variables, read when Ray Serve is imported.

To be applied before that, so this file imports nothing of Ray's. What the environment already says stays.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import MutableMapping

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
# An ingress that leaves waits so long for HAProxy to have taken it off its list: Serve's 30 s hold up every
# shutdown, and HAProxy asks others where one refuses.
_MIN_DRAINING_S = "5"


def prefer_fast_front(host: str, port: int, environment: MutableMapping[str, str] = os.environ) -> None:
    """HAProxy in front of the ingress, and Serve's settings for throughput, where others may call.

    Measured by `tests.bench.token_path`; the figures stand in ARCHITECTURE.md. HAProxy's own pages for
    metrics and statistics are open to the network, so a server for this machine alone does without.
    """
    if host in _LOOPBACK:
        return
    folder = f"{tempfile.gettempdir()}/ballonet-haproxy-{port}"  # Serve's own is one for the whole machine
    settings = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": _MIN_DRAINING_S,
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(_free_port(9101)),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(_free_port(8404)),
    }
    for name, value in settings.items():
        environment.setdefault(name, value)


def _free_port(preferred: int) -> int:
    """That one, or any if another process has it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", preferred))
        except OSError:
            probe.bind(("", 0))
        return int(probe.getsockname()[1])
