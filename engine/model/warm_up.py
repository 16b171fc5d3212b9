"""Compiles every kernel before the first request, all at the same time.

Triton compiles a kernel when it first runs, a second or so each: 13 s for those of a Llama-3.1-8B one
after another (H100, nothing cached). The tensors here are tiny, but strided as the engine's own, which is
what a compiled kernel depends on.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from engine.memory.kv_geometry import KvGeometry
from engine.model.buffers import activation_specs
from engine.model.loader import ModelFacts
from engine.model.sampler import Sampler

_NUM_TOKENS = 2
_NUM_ROWS = 2  # rows of KV: the guard's place, and the tokens'


def compile_kernels(facts: ModelFacts, geometry: KvGeometry) -> None:
    """Run each kernel of the model once. Does nothing on a CPU, whose kernels are compiled already."""
    if facts.device.type != "cuda":
        return
    todo = works(facts, geometry)
    with ThreadPoolExecutor(len(todo), initializer=lambda: torch.cuda.set_device(facts.device)) as threads:
        for future in [threads.submit(work) for work in todo]:
            future.result()
    torch.cuda.synchronize(facts.device)


def works(facts: ModelFacts, geometry: KvGeometry) -> list[Callable[[], None]]:
    """Independent pieces of work that together launch every kernel of the model."""
    tensors = _Tensors(facts, geometry)
    return [
        lambda: _run_prefill(facts, tensors),
        lambda: _run_decode(facts, tensors),
        lambda: _run_small(facts, tensors),
        lambda: _run_products(facts),
        lambda: _run_sampler(facts),
        lambda: _run_sums(facts, tensors),
    ]


class _Tensors:
    """Zeros in the shapes of a step of two tokens."""

    def __init__(self, facts: ModelFacts, geometry: KvGeometry) -> None:
        config, device = facts.shard.local, facts.device
        specs = activation_specs(facts.shard, facts.dtype, facts.kernels)
        buffers = {
            spec.name: torch.zeros(
                spec.count(_NUM_TOKENS, _NUM_TOKENS), spec.width, dtype=spec.dtype, device=device
            )
            for spec in specs
        }
        self.hidden, self.residual = buffers["hidden"], buffers["residual"]
        self.gate_up, self.activated = buffers["gate_up"], buffers["activated"]
        self.workspace = buffers["workspace"].view(-1)
        heads = config.num_heads, config.num_kv_heads, config.num_kv_heads
        parts = torch.split(buffers["qkv"], [count * config.head_dim for count in heads], dim=1)
        self.q, self.k, self.v = (
            part.view(_NUM_TOKENS, count, config.head_dim) for part, count in zip(parts, heads, strict=True)
        )
        self.out = buffers["attention"].view(self.q.shape)
        memory = torch.zeros(_NUM_ROWS * geometry.chunk_bytes, dtype=torch.uint8, device=device)
        self.kv = geometry.layer_view(memory.view(facts.dtype), _NUM_ROWS, 0)
        self.table = torch.zeros(8, config.head_dim // 2, device=device)
        self.norm = torch.ones(config.hidden_size, dtype=facts.dtype, device=device)
        self.head_norm = torch.ones(config.head_dim, dtype=facts.dtype, device=device)
        self.rows = torch.zeros(_NUM_TOKENS, dtype=torch.int64, device=device)
        self.lens = torch.ones(_NUM_TOKENS, dtype=torch.int32, device=device)
        self.starts = torch.arange(_NUM_TOKENS + 1, dtype=torch.int32, device=device)


@torch.inference_mode()
def _run_prefill(facts: ModelFacts, t: _Tensors) -> None:
    shared = t.rows, torch.zeros_like(t.lens)
    facts.kernels.prefill_attention(t.q, t.kv, t.starts, t.rows, *shared, t.lens, 1, 1.0, t.out)


@torch.inference_mode()
def _run_decode(facts: ModelFacts, t: _Tensors) -> None:
    facts.kernels.decode_plan(t.kv, t.lens, t.workspace)
    shared = t.rows, torch.zeros_like(t.lens)
    facts.kernels.decode_attention(t.q, t.kv, t.rows, *shared, t.lens, 1.0, t.workspace, t.out)


@torch.inference_mode()
def _run_small(facts: ModelFacts, t: _Tensors) -> None:
    kernels, eps = facts.kernels, facts.config.rms_norm_eps
    norm = t.head_norm if facts.config.qk_norm else None
    kernels.rotary_and_kv_write(t.q, t.k, t.v, t.table, t.table, t.rows, t.kv, t.rows, norm, norm, eps)
    kernels.rms_norm(t.hidden, t.norm, eps, out=t.hidden)
    kernels.add_rms_norm(t.hidden, t.residual, t.norm, eps, out=t.hidden)
    kernels.silu_and_mul(t.gate_up, out=t.activated)


@torch.inference_mode()
def _run_sums(facts: ModelFacts, t: _Tensors) -> None:
    """What the other ranks would have written is there: zeros."""
    shard = facts.shard
    if shard.size == 1:
        return
    from kernels.peer_sum import PeerRoom, sum_add_rms_norm  # imports Triton

    memory = torch.zeros(shard.size, *t.hidden.shape, dtype=facts.dtype, device=facts.device)
    addresses = torch.full((shard.size,), memory.data_ptr(), dtype=torch.int64, device=facts.device)
    rows, width = t.hidden.shape
    room = PeerRoom(addresses, rows, width, facts.dtype, shard.rank, shard.size)
    for has_residual in (False, True):
        memory.zero_()
        sum_add_rms_norm(
            room, t.hidden, t.residual, t.norm, facts.config.rms_norm_eps, t.hidden, has_residual
        )


@torch.inference_mode()
def _run_products(facts: ModelFacts) -> None:
    """For each input width of a model's products; rows and outputs are plain arguments."""
    config = facts.shard.local
    for width, bias in (
        (config.hidden_size, config.attention_bias),
        (config.q_size, config.output_bias),
        (config.hidden_size, config.mlp_bias),
        (config.intermediate_size, config.mlp_bias),
        (config.hidden_size, False),
    ):
        weight = torch.zeros(64, width, dtype=facts.dtype, device=facts.device)
        for rows in (1, 2):
            x, out = (torch.zeros(rows, size, dtype=facts.dtype, device=facts.device) for size in (width, 64))
            facts.kernels.skinny_matmul(x, weight, out[0] if bias else None, out)


def _run_sampler(facts: ModelFacts) -> None:
    config = facts.config
    Sampler(config.vocab_size, config.eos_token_ids, facts.device, 1, facts.kernels).warm_up(facts.dtype)
