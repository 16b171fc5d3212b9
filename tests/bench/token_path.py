"""Tokens on their way to HTTP clients: ours, a bare FastAPI server, and Ray Serve's own streaming.

    python -m tests.bench.token_path [--serve plain|haproxy|throughput] [--rounds 5]

The engine is arithmetic, so that what is measured is the way. Rivals are measured in turn in each round, by
a client in a process of its own: first alone, request after request (TTFT), then `--streams` of them at
once (tokens/s). `--serve` says how Ray Serve is set up, for ours and for its own streaming alike.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "plain": {},
    "haproxy": {"RAY_SERVE_ENABLE_HA_PROXY": "1"},
    "throughput": {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"},
    "haproxy+throughput": {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"},
}
Figures = dict[str, float]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure(url: str, streams: int, requests: int, tokens: int) -> Figures:
    """One run of the client."""
    command = [sys.executable, "-m", "tests.bench.token_client", url]
    options = ["--streams", str(streams), "--requests", str(requests), "--tokens", str(tokens)]
    done = subprocess.run(command + options, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    figures: Figures = json.loads(done.stdout)
    return figures


@contextmanager
def bare(step_s: float) -> Iterator[str]:
    """The URL of the bare server."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.token_servers", str(port), str(step_s)], cwd=ROOT
    )
    try:
        url = f"http://127.0.0.1:{port}/v1/completions"
        _wait_for(url)
        yield url
    finally:
        server.terminate()
        server.wait(30)


@contextmanager
def on_serve(step_s: float, num_ingresses: int) -> Iterator[dict[str, str]]:
    """The URLs of ours and of Ray Serve's own streaming, on one Serve."""
    import ray
    from ray import serve

    from cluster import launch
    from tests.bench import token_servers

    os.environ["PYTHONPATH"] = str(ROOT)
    launch.wait_for_slow_proxies()
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        try:
            serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
            application = token_servers.ours_on(step_s, Path(folder), num_ingresses)
            serve.run(application, name="ours", route_prefix="/ours")
            serve.run(token_servers.plain(step_s), name="plain", route_prefix="/plain")
            urls = {name: f"http://127.0.0.1:{port}/{name}/v1/completions" for name in ("ours", "plain")}
            for url in urls.values():
                _wait_for(url)
            yield urls
        finally:
            serve.shutdown()
            ray.shutdown()


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            measure(url, 1, 3, 4)
            return
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def run(args: argparse.Namespace) -> dict[str, dict[str, Figures]]:
    """Medians over the rounds: by server, of one client and of many."""
    step_s = args.step_ms / 1e3
    seen: dict[str, dict[str, list[Figures]]] = {}
    with ExitStack() as stack:
        urls = {"bare": stack.enter_context(bare(step_s))}
        urls |= stack.enter_context(on_serve(step_s, args.ingresses))
        for number in range(args.rounds):
            for name, url in urls.items():
                of = seen.setdefault(name, {"one": [], "many": []})
                of["one"].append(measure(url, 1, args.requests, 4))
                of["many"].append(measure(url, args.streams, args.streams, args.tokens))
                print(f"round {number + 1} {name:6} {_words(of['one'][-1], of['many'][-1])}", flush=True)
    return {
        name: {
            kind: {key: statistics.median(one[key] for one in runs) for key in runs[0]}
            for kind, runs in of.items()
        }
        for name, of in seen.items()
    }


def _words(one: Figures, many: Figures) -> str:
    return (
        f"TTFT {one['ttft_p50_ms']:6.2f} ms alone, {many['ttft_p50_ms']:7.1f} among many; "
        f"{many['tokens_per_s']:7.0f} tokens/s in {many['events_per_s']:7.0f} events/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--serve", choices=SETTINGS, default="plain")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=50, help="of the client that is alone")
    parser.add_argument("--streams", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=200, help="of each of the many answers")
    parser.add_argument("--step-ms", type=float, default=10.0, help="between two tokens of a stream")
    parser.add_argument("--ingresses", type=int, default=1, help="replicas of our ingress")
    args = parser.parse_args()
    os.environ.update(SETTINGS[args.serve])
    medians = run(args)
    for name, figures in medians.items():
        print(f"{name:14} {_words(figures['one'], figures['many'])}")
    ours, bare_, plain = medians["ours"], medians["bare"], medians["plain"]
    line: dict[str, Any] = {
        "bench": "token_path",
        "serve": args.serve,
        "streams": args.streams,
        "step_ms": args.step_ms,
        "figure": {
            "ttft_over_bare_ms": ours["one"]["ttft_p50_ms"] - bare_["one"]["ttft_p50_ms"],
            "tokens_over_plain": ours["many"]["tokens_per_s"] / plain["many"]["tokens_per_s"],
        },
        "ceiling": {"tokens_per_s": args.streams / args.step_ms * 1e3},
        "rival": {"bare": bare_, "plain": plain},
        "ours": ours,
        "cpus": os.cpu_count(),
    }
    from tests.bench.machine import machine

    print(json.dumps({**line, **machine()}))


if __name__ == "__main__":
    main()
