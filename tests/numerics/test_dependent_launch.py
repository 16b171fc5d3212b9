"""A kernel that starts before the ones ahead of it have ended reads what they wrote, not what was before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from engine.model.linear import Linear, make_linear
from kernels import dependent_launch, kv_tile
from kernels.dependent_launch import launch_options
from tests.numerics.cases import (
    AttentionShape,
    Backend,
    assert_close,
    int32,
    make_context,
    make_workspace,
    random,
)

# Of heads of 128 dims: decode attention starts early for these.
SHAPE = AttentionShape(query_heads=4, kv_heads=2, head_dim=128, tokens_per_row=64)
WIDTH, KV_WIDTH, GATES = SHAPE.query_heads * SHAPE.head_dim, SHAPE.kv_heads * SHAPE.head_dim, 4096


@pytest.mark.parametrize(("capability", "is_dependent"), [((8, 9), False), ((9, 0), True), ((12, 0), True)])
def test_gpus_from_hopper_on_start_kernels_early(
    capability: tuple[int, int], is_dependent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dependent_launch, "_capability", lambda device: capability)
    launch_options.cache_clear()
    options = launch_options(torch.device("cuda", 0))
    launch_options.cache_clear()
    assert options["IS_DEPENDENT"] is is_dependent
    assert options.get("launch_pdl", False) is is_dependent


def test_a_cpu_has_nothing_to_start_early() -> None:
    assert launch_options(torch.device("cpu")) == {"IS_DEPENDENT": False}


@pytest.mark.parametrize(
    ("shared_bytes", "head_dim", "element_bytes"),
    [(232_448, 128, 2), (232_448, 64, 2), (232_448, 256, 2), (232_448, 128, 4), (166_912, 128, 2)],
    # an H100's but for the last, which is an A100's
)
def test_as_many_programs_share_an_sm_as_planned(
    shared_bytes: int, head_dim: int, element_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_tile, "_shared_bytes", lambda device: shared_bytes)
    tile = kv_tile.tile_shape(128, head_dim, element_bytes, 64, 16 * 1024)
    stages = kv_tile.sharing_stages(tile, 16, element_bytes, 2, torch.device("cuda", 0))
    tile_bytes = 2 * tile.block_tokens * tile.block_dim * element_bytes
    queries = 16 * tile.block_dim * element_bytes
    program = (stages - 1) * tile_bytes + queries + 1024
    assert 2 * (program + 2048) <= shared_bytes + 1024 < 3 * program


class Layers:
    """A decode step's kernels in their order, each fed by the one before, over and over."""

    def __init__(self, backend: Backend, num_tokens: int) -> None:
        self.kernels, device = backend.kernels, backend.device
        dtype = torch.bfloat16

        def linear(*shape: int) -> Linear:
            return make_linear(random(*shape, dtype=dtype, device=device) * 0.05)

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        lengths = [200 + 40 * (index % 8) for index in range(num_tokens)]
        self.context = make_context(SHAPE, lengths, dtype, device)
        self.lens, self.workspace = int32(lengths, device), make_workspace(backend, SHAPE)
        self.positions = self.lens.long() - 1
        self.cos, self.sin = torch.rand(2, 1024, SHAPE.head_dim // 2, device=device).unbind()
        self.qkv_linear, self.out_linear = linear(WIDTH + 2 * KV_WIDTH, WIDTH), linear(WIDTH, WIDTH)
        self.gate_up_linear, self.down_linear = linear(2 * GATES, WIDTH), linear(WIDTH, GATES)
        self.norm = torch.ones(WIDTH, dtype=dtype, device=device)
        self.x = random(num_tokens, WIDTH, dtype=dtype, device=device)
        self.residual, self.hidden = empty(num_tokens, WIDTH), empty(num_tokens, WIDTH)
        self.qkv, self.attention = empty(num_tokens, WIDTH + 2 * KV_WIDTH), empty(num_tokens, 4, 128)
        self.gate_up, self.activated = empty(num_tokens, 2 * GATES), empty(num_tokens, GATES)

    def run(self, between: Callable[[], None] = lambda: None) -> torch.Tensor:
        """The residual after three layers, in a tensor of its own; `between` is called after every kernel."""
        kernels, kv, places = self.kernels, self.context.kv, self.context.places
        for buffer in (self.hidden, self.qkv, self.attention, self.gate_up, self.activated):
            buffer.fill_(float("nan"))
        self.residual.copy_(self.x)
        q, k, v = self.qkv.split([WIDTH, KV_WIDTH, KV_WIDTH], dim=1)
        q, k, v = q.view(-1, 4, 128), k.view(-1, 2, 128), v.view(-1, 2, 128)
        tables = self.cos, self.sin, self.positions
        steps: list[Callable[[], object]] = [
            lambda: self.qkv_linear(self.hidden, self.qkv),
            lambda: kernels.rotary_and_kv_write(q, k, v, *tables, kv, places[0], None, None, 1e-5),
            lambda: kernels.decode_attention(q, kv, *places, self.lens, 0.09, self.workspace, self.attention),
            lambda: self.out_linear(self.attention.flatten(1), self.hidden),
            lambda: kernels.add_rms_norm(self.hidden, self.residual, self.norm, 1e-5, out=self.hidden),
            lambda: self.gate_up_linear(self.hidden, self.gate_up),
            lambda: kernels.silu_and_mul(self.gate_up, out=self.activated),
            lambda: self.down_linear(self.activated, self.hidden),
            lambda: kernels.add_rms_norm(self.hidden, self.residual, self.norm, 1e-5, out=self.hidden),
        ]
        kernels.decode_plan(kv, self.lens, self.workspace)
        between()
        kernels.rms_norm(self.residual, self.norm, 1e-5, out=self.hidden)
        between()
        for step in steps * 3:
            step()
            between()
        return self.residual.clone()


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 3, 40])
def test_a_step_computes_the_same_as_kernel_after_kernel(device: torch.device, num_tokens: int) -> None:
    from kernels import triton_backend

    layers = Layers(Backend(triton_backend, device), num_tokens)
    layers.run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = layers.run()
    for _ in range(30):
        layers.x.normal_()
        expected = layers.run(between=torch.cuda.synchronize)
        assert_close(layers.run(), expected.double().cpu())
        graph.replay()
        assert_close(replayed, expected.double().cpu())
