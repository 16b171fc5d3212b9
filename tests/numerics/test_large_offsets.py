"""Rows of activations more than 2^31 elements apart give what they give side by side.

A prompt of 262,144 tokens has 7.5e9 gate and up activations in Llama-3.1-8B. Here three rows stand for it:
the last begins past 2^31, and an offset in 32 bits would fall in front of the first, where memory is
reserved too. Without a GPU none of it takes room: pages that nobody touches do not exist.
"""

from __future__ import annotations

import mmap

import pytest
import torch

from tests.numerics.cases import AttentionShape, Backend, int32, make_context, make_workspace, random
from tests.numerics.sparse_pool import MAP_NORESERVE
from tests.unit.sampling_cases import random_logits, row, sample

ROWS = 3
STRIDE = (1 << 30) + 16
EPS = 1e-5
DTYPE = torch.bfloat16
SHAPE = AttentionShape(query_heads=4, kv_heads=2, head_dim=64, tokens_per_row=64)


def far_apart(device: torch.device, *widths: int) -> list[torch.Tensor]:
    """Tensors (ROWS, width) of NaN, beside one another, with rows STRIDE elements apart."""
    assert (ROWS - 1) * STRIDE >= 1 << 31
    first, count = 1 << 31, (1 << 31) + ROWS * STRIDE
    if device.type == "cuda":
        memory = torch.empty(count, dtype=DTYPE, device=device)
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        memory = torch.frombuffer(mmap.mmap(-1, count * DTYPE.itemsize, flags=flags), dtype=DTYPE)
    tensors = []
    for width in widths:
        tensors.append(memory.as_strided((ROWS, width), (STRIDE, 1), first).fill_(float("nan")))
        first += -(-width // 16) * 16
    return tensors


def far_copy(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The same values (ROWS, ...), with rows far apart."""
    far = far_apart(tensors[0].device, *(tensor[0].numel() for tensor in tensors))
    return [place.view(tensor.shape).copy_(tensor) for place, tensor in zip(far, tensors, strict=True)]


def normal(backend: Backend, *shape: int) -> torch.Tensor:
    return random(*shape, dtype=DTYPE, device=backend.device)


def test_silu_and_mul(backend: Backend) -> None:
    near, out = normal(backend, ROWS, 2 * 1100), normal(backend, ROWS, 1100)
    far, far_out = far_copy(near, out)
    backend.kernels.silu_and_mul(near, out)
    backend.kernels.silu_and_mul(far, far_out)
    assert torch.equal(far_out, out)


@pytest.mark.parametrize("shape", [(ROWS, 200), (ROWS, 3, 64)], ids=str)
def test_rms_norm(backend: Backend, shape: tuple[int, ...]) -> None:
    near, out, weight = normal(backend, *shape), normal(backend, *shape), normal(backend, shape[-1])
    far, far_out = far_copy(near, out)
    backend.kernels.rms_norm(near, weight, EPS, out)
    backend.kernels.rms_norm(far, weight, EPS, far_out)
    assert torch.equal(far_out, out)


def test_add_rms_norm(backend: Backend) -> None:
    x, residual, weight = normal(backend, ROWS, 200), normal(backend, ROWS, 200), normal(backend, 200)
    far_x, far_residual = far_copy(x, residual)
    backend.kernels.add_rms_norm(x, residual, weight, EPS, x)
    backend.kernels.add_rms_norm(far_x, far_residual, weight, EPS, far_x)
    assert torch.equal(far_x, x)
    assert torch.equal(far_residual, residual)


def test_rotary_and_kv_write(backend: Backend) -> None:
    device, dim = backend.device, SHAPE.head_dim
    near = [normal(backend, ROWS, heads, dim) for heads in (4, 2, 2)]
    far = far_copy(*near)
    tables = torch.rand(2, 100, dim // 2, device=device).unbind()
    positions = torch.tensor([70, 0, 99], device=device)
    rows = torch.tensor([0, 3, 5], device=device)
    pools = torch.zeros(2, 8, 2, SHAPE.tokens_per_row, 2, dim, dtype=DTYPE, device=device).unbind()
    for (q, k, v), kv in zip((near, far), pools, strict=True):
        backend.kernels.rotary_and_kv_write(q, k, v, *tables, positions, kv, rows, None, None, EPS)
    assert torch.equal(far[0], near[0])
    assert torch.equal(*pools)
    assert pools[0].any()


def prefill(backend: Backend, shape: AttentionShape) -> None:
    context = make_context(shape, [2 * shape.tokens_per_row + ROWS], DTYPE, backend.device)
    q = normal(backend, ROWS, shape.query_heads, shape.head_dim)
    out = torch.empty_like(q)
    far_q, far_out = far_copy(q, out)
    starts, lens = int32([0, ROWS], backend.device), int32([len(context.keys[0])], backend.device)
    for queries, result in ((q, out), (far_q, far_out)):
        backend.kernels.prefill_attention(
            queries, context.kv, starts, *context.places, lens, ROWS, 0.1, result
        )
    assert torch.equal(far_out, out)
    assert not out.isnan().any()


def test_prefill_attention(backend: Backend) -> None:
    prefill(backend, AttentionShape(query_heads=4, kv_heads=2, head_dim=32, tokens_per_row=16))


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
def test_prefill_attention_on_hopper(backend: Backend) -> None:
    prefill(backend, SHAPE)


def test_decode_attention(backend: Backend) -> None:
    lengths = [3, 700, 130]  # whole and divided ones: both kernels write
    context = make_context(SHAPE, lengths, DTYPE, backend.device)
    q = normal(backend, ROWS, SHAPE.query_heads, SHAPE.head_dim)
    out, workspace = torch.empty_like(q), make_workspace(backend, SHAPE)
    far_q, far_out = far_copy(q, out)
    lens = int32(lengths, backend.device)
    backend.kernels.decode_plan(context.kv, lens, workspace)
    for queries, result in ((q, out), (far_q, far_out)):
        backend.kernels.decode_attention(queries, context.kv, *context.places, lens, 0.1, workspace, result)
    assert torch.equal(far_out, out)
    assert not out.isnan().any()


@pytest.mark.parametrize("num_rows", [1, 2])
def test_weights_of_skinny_matmul(backend: Backend, num_rows: int) -> None:
    weight, x = normal(backend, ROWS, 100), normal(backend, num_rows, 100)
    (far,) = far_copy(weight)
    out, far_out = normal(backend, num_rows, ROWS), normal(backend, num_rows, ROWS)
    backend.kernels.skinny_matmul(x, weight, None, out)
    backend.kernels.skinny_matmul(x, far, None, far_out)
    assert torch.equal(far_out, out)


def test_sampling(backend: Backend) -> None:
    """The last row with what reads logits in each kernel: penalties, a bias, top_k and top_p."""
    kinds = ({}, {"top_k": 2, "top_p": 0.9}, {"presence_penalty": 1.5, "logit_bias": ((7, 4.0),)})
    near = random_logits(ROWS, 300).to(DTYPE).to(backend.device)
    (far,) = far_copy(near)
    for kind in kinds:
        rows = [row(output=(5,), temperature=2.0, seed=index, **kind) for index in range(ROWS)]
        results = [sample(logits, *rows, kernels=backend.kernels) for logits in (near, far)]
        assert results[0] == results[1]
        assert not any(one.error for one in results[0])
