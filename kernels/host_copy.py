"""Words between the device and pinned host memory, read and written by a kernel.

The copy engine that a small transfer would go through serves one queue: behind KV on its way to or from
the host, the inputs of a step waited until 1 GiB had passed, 14 ms (H100). A kernel needs no copy engine.
Semantics: `kernels.reference.copy_words`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.checks import require, require_reachable

_BLOCK = 512


@triton.jit(do_not_specialize=["count"])
def _copy_words_kernel(source_ptr, target_ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target_ptr + at, tl.load(source_ptr + at, mask=at < count), mask=at < count)


def copy_words(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """See `kernels.reference.copy_words`. Raises ValueError naming an argument that is wrong."""
    for name, tensor in (("source", source), ("target", target)):
        require(tensor.dtype == torch.int32, name, "of int32")
        require(tensor.is_contiguous(), name, "contiguous")
        require_reachable(name, tensor)
    require(target.shape == source.shape, "target", f"of shape {tuple(source.shape)}")
    count = source.numel()
    if count:
        _copy_words_kernel[(triton.cdiv(count, _BLOCK),)](source, target, count, BLOCK=_BLOCK, num_warps=4)
    return target
