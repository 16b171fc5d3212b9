"""What every launcher asks of its arguments, so that a wrong one is named before a kernel runs.

Looks at shapes, dtypes, strides and devices alone: values live on the GPU, and reading one would
wait for every kernel before it.
"""

from __future__ import annotations

import torch
from triton import knobs


def require(holds: bool, name: str, expected: str) -> None:
    """Raise ValueError saying that argument `name` must be `expected`, unless it is."""
    if not holds:
        raise ValueError(f"{name} must be {expected}")


def require_launchable(name: str, tensor: torch.Tensor) -> None:
    """`tensor` is on a GPU, or Triton interprets its kernels on the CPU."""
    if not (tensor.is_cuda or knobs.runtime.interpret):
        raise ValueError(f"{name} must be a CUDA tensor; a CPU tensor needs TRITON_INTERPRET=1")


def require_reachable(name: str, tensor: torch.Tensor) -> None:
    """`tensor` is where a kernel can reach it: on a GPU, or in pinned host memory; or Triton interprets."""
    is_there = tensor.is_cuda or not tensor.numel() or knobs.runtime.interpret or tensor.is_pinned()
    require(is_there, name, "a CUDA tensor or in pinned memory")


def require_like(name: str, tensor: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor) -> None:
    """`tensor` has this shape, the dtype and device of `like`, and a contiguous last dimension."""
    if tensor.shape != shape:
        raise ValueError(f"{name} must be of shape {shape}, not {tuple(tensor.shape)}")
    if tensor.dtype != like.dtype:
        raise ValueError(f"{name} must be {like.dtype}, not {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, not {tensor.device}")
    if tensor.stride(-1) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension, not {tensor.stride()}")


def require_index(
    name: str, tensor: torch.Tensor, length: int, dtype: torch.dtype, like: torch.Tensor
) -> None:
    """`tensor` is a contiguous vector of `length` integers of `dtype` on the device of `like`."""
    if tensor.shape != (length,):
        raise ValueError(f"{name} must be of shape ({length},), not {tuple(tensor.shape)}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, not {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, not {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, not {tensor.stride()}")


def require_pool(kv: torch.Tensor, like: torch.Tensor) -> None:
    """`kv` is a layer's view (rows, 2, T, kv_heads, head_dim) of the pool, of the dtype of `like`."""
    if kv.dim() != 5 or kv.shape[1] != 2:
        raise ValueError(f"kv must be of shape (rows, 2, T, kv_heads, head_dim), not {tuple(kv.shape)}")
    if kv.dtype != like.dtype:
        raise ValueError(f"kv must be {like.dtype}, not {kv.dtype}")
    if kv.device != like.device:
        raise ValueError(f"kv must be on {like.device}, not {kv.device}")
    if kv.stride(4) != 1:
        raise ValueError(f"kv must be contiguous in its last dimension, not {kv.stride()}")
