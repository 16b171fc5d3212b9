"""Launches the prefill kernel of Hopper GPUs, and says which inputs it takes.

A launch is made once a layer, so what does not change between layers and steps is kept: descriptors of
tensors by address, shape and strides, the compiled kernel by what it is compiled for. Nothing kept holds
a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import cycle
from typing import Any

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.kv_tile import LOG2_E
from kernels.prefill_hopper_kernel import prefill_kernel

# 168 registers a thread at the start, for three warpgroups; the producer then leaves most of its own to the
# consumers, which end up with 240.
LAUNCH_OPTIONS = {"num_warps": 4, "maxnreg": 168, "enable_fp_fusion": True}
_HEAD_DIMS = (64, 96, 128, 256)
_GLUON_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_ALIGNED_BYTES = 16  # what TMA asks of addresses and strides
_ALIGNED_ELEMENTS = 8
_NUM_STAGES = 2
_WARPGROUP_ROWS = 64
# Tiles of keys for each look at their largest score. Float16 has no room for weights far above 1.
_TILES_PER_LOOK = 17  # odd: those between are taken in pairs
# Keys and values that take turns in L2, of an H100's 50 MB, so that programs find each other's tiles there:
# 8 x 2k on 14k tokens lost 5 % at 64 MiB, and nothing gained at 16.
_L2_BYTES = 32 << 20
# Launches that may be under way together; each finds a counter of its own.
_NUM_COUNTERS = 64


@dataclass(frozen=True, eq=False)
class Variant:
    """What the kernel is compiled for.

    Attributes:
        heads: query heads of one KV head that share a tile, the largest power of two in the group.
        slots: tiles' worth of heads that share a KV head: group / heads.
        block_tokens: keys of a tile, which divide T.
        block_dim: head_dim rounded up to a power of two; what lies between is read as zeros.
    """

    dtype: torch.dtype
    heads: int
    slots: int
    tokens_per_row: int
    head_dim: int
    block_tokens: int
    block_dim: int

    @property
    def q_box(self) -> tuple[int, ...]:
        """The box of queries (tokens, heads, dims) that a consumer works on."""
        return _WARPGROUP_ROWS // self.heads, self.heads, self.block_dim

    @property
    def kv_box(self) -> tuple[int, ...]:
        """The box of keys or of values (row, K or V, tokens, head, dims)."""
        return 1, 1, self.block_tokens, 1, self.block_dim

    def constants(self) -> tuple[int, ...]:
        """The kernel's compile-time arguments, in its order."""
        return (
            self.heads, self.slots, self.tokens_per_row, self.head_dim, self.block_tokens, self.block_dim,
            _NUM_STAGES, _TILES_PER_LOOK if self.dtype == torch.bfloat16 else 1,
        )  # fmt: skip


@dataclass(frozen=True, eq=False, slots=True)
class HopperPool:
    """A layer's view of the pool, ready for launches.

    Attributes:
        kernel: compiled for this view's device; indexed with a grid, it launches.
        counters: pairs of zeros by which programs share out tiles, and which they leave at zero.
    """

    variant: Variant
    descriptor: TensorDescriptor
    kernel: Any
    num_processors: int
    counters: Iterator[torch.Tensor]


def hopper_pool(q: torch.Tensor, kv: torch.Tensor, out: torch.Tensor) -> HopperPool | None:
    """`kv` ready for this kernel, or None where the portable kernel has to serve.

    That is in the interpreter and on other GPUs (no wgmma), for float32 (wgmma would round it), for head
    dims and T that no tile fits, and for tensors whose addresses or strides TMA cannot express.
    """
    if not q.is_cuda or not (_is_aligned(q) and _is_aligned(out)):
        return None
    return _find_pool(kv.data_ptr(), kv.dtype, kv.shape, kv.stride(), kv.device, q.shape[1])


def _is_aligned(tensor: torch.Tensor) -> bool:
    token_stride, head_stride, _ = tensor.stride()
    return (
        tensor.data_ptr() % _ALIGNED_BYTES == 0
        and token_stride % _ALIGNED_ELEMENTS == 0
        and head_stride % _ALIGNED_ELEMENTS == 0
    )


@lru_cache(maxsize=512)  # a pool has a view for each layer
def _find_pool(
    address: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    device: torch.device,
    query_heads: int,
) -> HopperPool | None:
    variant = variant_for(dtype, query_heads, shape[4], shape[2], shape[3])
    if variant is None or torch.cuda.get_device_capability(device)[0] != 9:
        return None
    if address % _ALIGNED_BYTES != 0 or any(stride % _ALIGNED_ELEMENTS != 0 for stride in strides[:4]):
        return None
    num_processors = torch.cuda.get_device_properties(device).multi_processor_count
    descriptor = _describe(address, dtype, shape, strides, variant.kv_box)
    return HopperPool(variant, descriptor, _compile(variant, device), num_processors, _counters(device))


@cache
def variant_for(
    dtype: torch.dtype, query_heads: int, head_dim: int, tokens_per_row: int, kv_heads: int
) -> Variant | None:
    """The part of `hopper_pool`'s answer that dtype and shapes decide."""
    block_tokens = 128 if tokens_per_row % 128 == 0 and head_dim <= 128 else 64
    if dtype not in _GLUON_DTYPES or head_dim not in _HEAD_DIMS or tokens_per_row % block_tokens != 0:
        return None
    group = query_heads // kv_heads
    heads = min(group & -group, _WARPGROUP_ROWS)
    block_dim = triton.next_power_of_2(head_dim)
    return Variant(dtype, heads, group // heads, tokens_per_row, head_dim, block_tokens, block_dim)


def prefill_attention_hopper(
    pool: HopperPool,
    q: torch.Tensor,
    query_starts: torch.Tensor,
    first_rows: torch.Tensor,
    shared_first_rows: torch.Tensor,
    shared_lens: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """See `kernels.reference.prefill_attention`; arguments are checked, and `pool` is the answer to them."""
    variant = pool.variant
    num_tokens, query_heads, head_dim = q.shape
    kv_heads = query_heads // (variant.heads * variant.slots)
    num_sequences = first_rows.numel()
    most_blocks = num_tokens * variant.heads // (2 * _WARPGROUP_ROWS) + num_sequences
    num_programs = min(pool.num_processors, most_blocks * kv_heads * variant.slots)
    token_stride, head_stride, _ = out.stride()
    pool.kernel[(num_programs, 1, 1)](
        _describe_queries(q.data_ptr(), q.dtype, q.shape, q.stride(), variant.q_box), pool.descriptor,
        out, query_starts, first_rows, shared_first_rows, shared_lens, context_lens, next(pool.counters),
        scale * LOG2_E,
        token_stride // _ALIGNED_ELEMENTS, head_stride // _ALIGNED_ELEMENTS,
        num_sequences, kv_heads, _L2_BYTES // (4 * head_dim), *variant.constants(),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Address:
    """What a descriptor needs of a tensor, without keeping the tensor."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


def _describe(
    address: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(list(box), _GLUON_DTYPES[dtype])
    return TensorDescriptor(_Address(address, dtype), list(shape), list(strides), list(box), layout)


# Queries lie where the arena put them for a step's number of tokens, the same in every layer.
_describe_queries = lru_cache(maxsize=64)(_describe)


@cache
def _compile(variant: Variant, device: torch.device) -> Any:
    """The kernel for the current device, which is `device`; launched as it is, without Triton's look-ups."""
    dtype = variant.dtype
    q = _describe(0, dtype, (1, variant.heads, variant.head_dim), (1024, 1024, 1), variant.q_box)
    kv = _describe(0, dtype, (1, 2, 128, 1, variant.head_dim), (1024, 1024, 1024, 1024, 1), variant.kv_box)
    # out, query_starts, first_rows, shared_first_rows, shared_lens, context_lens, counter
    pointers = (dtype, torch.int32, torch.int64, torch.int64, torch.int32, torch.int32, torch.int32)
    return prefill_kernel.warmup(
        q, kv, *pointers, 1.0, 0, 0, 0, 0, 0, *variant.constants(), grid=(1,), **LAUNCH_OPTIONS
    )


@cache
def _counters(device: torch.device) -> Iterator[torch.Tensor]:
    return cycle(torch.zeros(_NUM_COUNTERS, 2, dtype=torch.int32, device=device).unbind())
