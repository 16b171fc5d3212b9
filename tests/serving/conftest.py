"""One local Ray for all serving tests, with one application of two models on fake engines."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cluster import app, launch
from cluster.config import ServeFile, ServingArgs, load, validate
from tests.serving.fake_engine import FakeEngine

ROOT = Path(__file__).parents[2]
ROUTE = "/fake"
ADMIN_KEY = "root"  # opens POST /trim; everything else is open to all


def build_fake(args: dict[str, Any]) -> serve.Application:
    """`cluster.app.build` with fake engines."""
    return app.build_application(validate(ServingArgs, args), FakeEngine)


def llm(model_id: str, source: Path | str, tokenizer: Path, **sections: Any) -> dict[str, Any]:
    """One entry of `llm_configs` that reacts fast to deaths."""
    return {
        "model_loading_config": {
            "model_id": model_id,
            "model_source": str(source),
            "tokenizer_source": str(tokenizer),
        },
        "engine_kwargs": sections.pop("engine_kwargs", {"device": "cpu"}),
        "deployment_config": {
            "health_check_period_s": 0.5,
            "graceful_shutdown_timeout_s": 1.0,
            "graceful_shutdown_wait_loop_s": 0.2,
        }
        | sections.pop("deployment_config", {}),
        **sections,
    }


def serve_file(port: int, name: str, route: str, *llms: dict[str, Any], **controller: float) -> ServeFile:
    """A file with one application; `controller` are constants of that."""
    application = {
        "name": name,
        "route_prefix": route,
        "import_path": "cluster.app:build",
        "args": {
            "llm_configs": list(llms),
            "controller": {"tick_s": 0.2} | controller,
            "ingress": {"admin_api_keys": [ADMIN_KEY]},
        },
    }
    http = {"host": "127.0.0.1", "port": port}
    return validate(
        ServeFile, {"applications": [application], "http_options": http, "proxy_location": "HeadOnly"}
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="package")
def port() -> int:
    return free_port()


@pytest.fixture(scope="package")
def ray_cluster() -> Iterator[None]:
    given = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{ROOT}:{given}" if given else str(ROOT)  # the workers', if not installed
    launch.wait_for_slow_proxies()
    ray.init(
        "local",
        num_cpus=8,  # a share for each application of the session; nothing is bound to a core
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _system_config={"metrics_report_interval_ms": 500},
    )
    yield
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="package")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 200 words, with a chat template."""
    vocab = {f"▁word{number}": number for number in range(200)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="▁word0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(path / "tokenizer.json"))
    template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    (path / "chat_template.jinja").write_text(template)
    return path


@pytest.fixture(scope="package")
def base_url(ray_cluster: None, port: int, tokenizer_dir: Path) -> Iterator[str]:
    """Of an application with the models `fake`, `narrow` (one request at a time, one waiting) and
    `pair` (two groups)."""
    narrow = {"max_ongoing_requests": 1, "max_queued_requests": 1}
    file = serve_file(
        port,
        "fake",
        ROUTE,
        llm("fake", tokenizer_dir, tokenizer_dir),
        llm("narrow", tokenizer_dir, tokenizer_dir, deployment_config=narrow),
        llm("pair", tokenizer_dir, tokenizer_dir, deployment_config={"num_replicas": 2}),
    )
    with launch.deployed(file, print, build_fake) as url:
        yield url + ROUTE


@pytest.fixture(scope="package")
def demo_url(ray_cluster: None, port: int, base_url: str, demo_model_path: Path) -> Iterator[str]:
    """Of `deploy/laptop.yaml` with its real model, beside the fakes: one Ray has one HTTP port."""
    file = load(ROOT / "deploy" / "laptop.yaml")
    application = file.applications[0]
    ingress = application.args.ingress.model_copy(update={"admin_api_keys": (ADMIN_KEY,)})
    args = application.args.model_copy(update={"ingress": ingress})
    application = application.model_copy(update={"name": "demo", "route_prefix": "/demo", "args": args})
    http = file.http_options.model_copy(update={"port": port})
    file = file.model_copy(update={"applications": (application,), "http_options": http})
    with launch.deployed(file, print) as url:
        yield f"{url}/demo"


@pytest.fixture
def http(base_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=base_url, timeout=30) as client:
        yield client
