"""What `ballonet serve` tells Ray Serve by the environment."""

from __future__ import annotations

import socket

import pytest

from cluster.serve_settings import prefer_fast_front


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_a_server_for_this_machine_opens_no_other_port(host: str) -> None:
    environment: dict[str, str] = {}
    prefer_fast_front(host, 8000, environment)
    assert environment == {}


def test_what_the_environment_says_stays() -> None:
    environment = {"RAY_SERVE_ENABLE_HA_PROXY": "0"}
    prefer_fast_front("0.0.0.0", 8000, environment)
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
    assert environment["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"


def test_two_servers_on_one_machine_get_in_no_ones_way() -> None:
    first: dict[str, str] = {}
    prefer_fast_front("0.0.0.0", 8000, first)
    ports = ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT")
    with socket.socket() as metrics, socket.socket() as stats:
        for listener, name in zip((metrics, stats), ports, strict=True):
            listener.bind(("", int(first[name])))
            listener.listen()
        second: dict[str, str] = {}
        prefer_fast_front("0.0.0.0", 8001, second)
    own = [name for name in first if name.startswith("RAY_SERVE_HAPROXY_")]
    assert len(own) == 6
    assert all(first[name] != second[name] for name in own)
