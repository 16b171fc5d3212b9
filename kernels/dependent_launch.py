"""Programmatic dependent launch: a kernel's programs take their places while the kernel before still runs.

A decode step of Llama-3.1-8B is over 300 kernels of a few microseconds. Launched one after the other, each
pays for its start, and for the last programs of the one before, with memory idle. From Hopper on a kernel
may be started early, and then waits itself for what it needs from the kernels before:

    start_dependents(IS_DEPENDENT)      the next kernel may take what room is left from now on
    ...                                 only what no kernel of a step writes, such as weights
    wait_for_dependencies(IS_DEPENDENT) returns when all kernels before have ended

Every program of such a kernel must wait, also one that has nothing to do: the kernel after the next relies
on it. Kernels launched in the plain way, as torch's are, begin when all before them have ended, as ever.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

_FIRST_CAPABILITY = (9, 0)


@cache
def launch_options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments for launching a kernel that has the parameter IS_DEPENDENT."""
    if _capability(device) >= _FIRST_CAPABILITY:
        return {"IS_DEPENDENT": True, "launch_pdl": True}
    return {"IS_DEPENDENT": False}


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@triton.jit
def start_dependents(IS_DEPENDENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Let the next kernel start once all programs of this one have come here."""
    if IS_DEPENDENT:
        cuda.gdc_launch_dependents()


@triton.jit
def wait_for_dependencies(IS_DEPENDENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait until the kernels before this one have ended and what they wrote can be read."""
    if IS_DEPENDENT:
        cuda.gdc_wait()
