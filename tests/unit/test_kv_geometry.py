"""How KV fills chunks: the rule, its waste, and the layout of a layer's view."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.memory.arena import ActivationArena, BufferSpec, activation_bytes
from engine.memory.chunks import ChunkPool
from engine.memory.host_vmm import HostVirtualMemory
from engine.memory.kv_cache import KvCache
from engine.memory.kv_geometry import KvGeometry

MIB = 1 << 20


def test_llama_8b_fills_two_mib_chunks_with_four_layers_of_128_tokens() -> None:
    geometry = KvGeometry.choose(32, 8, 128, 2, 2 * MIB)
    assert (geometry.layers_per_group, geometry.tokens_per_chunk) == (4, 128)
    assert geometry.chunks_for(1) == 8
    assert geometry.chunks_for(129) == 16
    assert geometry.bytes_per_token == 128 * 1024


@given(
    layers=st.integers(1, 96),
    heads=st.integers(1, 32),
    head_dim=st.sampled_from([16, 64, 80, 96, 128, 256]),
    itemsize=st.sampled_from([1, 2, 4]),
    chunk=st.sampled_from([64 * 1024, 512 * 1024, 2 * MIB]),
)
def test_any_model_fits_its_chunks(layers: int, heads: int, head_dim: int, itemsize: int, chunk: int) -> None:
    geometry = KvGeometry.choose(layers, heads, head_dim, itemsize, chunk)
    used = geometry.layers_per_group * 2 * geometry.tokens_per_chunk * heads * head_dim * itemsize
    assert 0 < used <= chunk
    assert (
        (geometry.num_groups - 1) * geometry.layers_per_group
        < layers
        <= geometry.num_groups * geometry.layers_per_group
    )


def test_a_chunk_too_small_for_a_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="raise memory.chunk_bytes"):
        KvGeometry.choose(32, 32, 128, 4, 4096)


def test_the_number_of_layers_can_be_set() -> None:
    assert KvGeometry.choose(32, 8, 128, 2, 2 * MIB, layers_per_group=1).tokens_per_chunk == 512


def test_layers_and_tokens_do_not_overlap() -> None:
    geometry = KvGeometry.choose(5, 2, 8, 4, 4096, layers_per_group=2)
    vm = HostVirtualMemory(4096, 64)
    chunks = ChunkPool(vm, 64)
    guard = chunks.take(1, "guard")
    assert guard is not None
    kv = KvCache(chunks, geometry, 2, 100, torch.float32, guard[0])
    for slot in range(2):
        for tensor, row in kv.missing(slot, 40):
            taken = chunks.take(1, "kv")
            assert taken is not None
            tensor.map([row], taken)
        kv.grown(slot, 40)
    value = 0.0
    rows = [kv.first_row(slot) + r for slot in range(2) for r in range(geometry.rows_for(40))]
    for view in kv.layer_views:
        for row in rows:
            value += 1
            view[row] = value
    value = 0.0
    for view in kv.layer_views:
        for row in rows:
            value += 1
            assert bool((view[row] == value).all())


@given(tokens=st.integers(1, 300), rows=st.integers(0, 20))
def test_arena_buffers_lie_where_planned_and_stages_share(tokens: int, rows: int) -> None:
    specs = (
        BufferSpec("hidden", 33, torch.float32, "token"),
        BufferSpec("qkv", 70, torch.bfloat16, "token", "attention"),
        BufferSpec("out", 20, torch.bfloat16, "token", "attention"),
        BufferSpec("gate", 90, torch.float32, "token", "mlp"),
        BufferSpec("logits", 50, torch.float32, "row", "head"),
    )
    total = activation_bytes(specs, tokens, rows)
    chunks = ChunkPool(HostVirtualMemory(4096, 512), 512)
    arena = ActivationArena(chunks, specs, 300, 20)
    need = max(1, arena.chunks_for(tokens, rows))
    taken = chunks.take(need, "activation")
    assert taken is not None
    arena.tensor.map(range(need), taken)
    buffers = arena.buffers(tokens, rows)
    base = arena.tensor.address
    ends = {}
    for name, buffer in buffers.items():
        buffer.fill_(1.0)
        start = buffer.data_ptr() - base if buffer.numel() else 0
        ends[name] = (start, start + buffer.numel() * buffer.element_size())
        assert start % 256 == 0
        assert ends[name][1] <= total <= need * 4096
    assert ends["qkv"][0] == ends["gate"][0] >= ends["hidden"][1]
    assert ends["out"][0] >= ends["qkv"][1]
    assert arena.buffers(tokens, rows) is buffers
