"""Where a benchmark ran: the GPU, versions and the commit, for the JSON line that ends it."""

from __future__ import annotations

import os
from typing import Any

import torch

from cluster.bench import report

_PACKAGES = ("torch", "triton", "transformers", "vllm")


def machine() -> dict[str, Any]:
    """GPU (None without one), versions, commit. A host without git is told the commit by GIT_COMMIT."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    facts = report.machine(gpu, _PACKAGES)
    return facts | {"commit": os.environ.get("GIT_COMMIT") or facts["commit"]}
