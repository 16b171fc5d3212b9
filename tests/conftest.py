"""What every test needs: where kernels run, and which tests this machine can run.

A test says what it needs with a marker (`gpu`, `model`, `ray`); one whose need is not met is skipped
with its reason in the summary. In CI (`CI=true`) a missing demo model is an error instead: there it
means a broken set-up, and skipping would pass it off as success.
"""

from __future__ import annotations

import os
from pathlib import Path

# Asks NVML: the driver itself, once initialised, does not survive the forks that some tests make.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
# Ray starts a cluster for whoever asks it anything. Its daemons end with the thread that asked, and a minute
# later Ray ends the process that lost them: no test may do that unawares.
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a jit function is defined

MAX_THREADS = 2  # more only makes the tests' small matrices wait for each other
torch.set_num_threads(min(MAX_THREADS, torch.get_num_threads()))

DEMO_MODEL = Path.home() / ".cache" / "ballonet" / "SmolLM2-135M-Instruct.Q4_1.gguf"
IN_CI = os.environ.get("CI", "").lower() in ("true", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run, and say why."""
    if item.get_closest_marker("gpu") and not HAS_CUDA:
        pytest.skip("no CUDA device")
    if item.get_closest_marker("model"):
        _require_demo_model()


@pytest.fixture(scope="session")
def demo_model_path() -> Path:
    """The demo model's GGUF file. Tests that use it are marked `model`."""
    _require_demo_model()
    return DEMO_MODEL


def _require_demo_model() -> None:
    if DEMO_MODEL.is_file():
        return
    reason = f"{DEMO_MODEL} is missing: run `make model`"
    if IN_CI:
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
