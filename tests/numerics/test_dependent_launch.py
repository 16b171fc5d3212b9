"""A kernel that starts before the ones ahead of it have ended reads what they wrote, not what was before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

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

WIDTH, GATES = 512, 4096
SHAPE = AttentionShape(query_heads=8, kv_heads=2, head_dim=64, tokens_per_row=64)


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

        def weight(*shape: int) -> torch.Tensor:
            return random(*shape, dtype=dtype, device=device) * 0.05

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        lengths = [200 + 40 * (index % 8) for index in range(num_tokens)]
        self.context = make_context(SHAPE, lengths, dtype, device)
        self.lens, self.workspace = int32(lengths, device), make_workspace(backend, SHAPE)
        self.positions = self.lens.long() - 1
        self.cos, self.sin = torch.rand(2, 1024, 32, device=device).unbind()
        self.qkv_weight, self.out_weight = weight(WIDTH + 256, WIDTH), weight(WIDTH, WIDTH)
        self.gate_up_weight, self.down_weight = weight(2 * GATES, WIDTH), weight(WIDTH, GATES)
        self.norm = torch.ones(WIDTH, dtype=dtype, device=device)
        self.x = random(num_tokens, WIDTH, dtype=dtype, device=device)
        self.residual, self.hidden = empty(num_tokens, WIDTH), empty(num_tokens, WIDTH)
        self.qkv, self.attention = empty(num_tokens, WIDTH + 256), empty(num_tokens, 8, 64)
        self.gate_up, self.activated = empty(num_tokens, 2 * GATES), empty(num_tokens, GATES)

    def multiply(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """As the model does it: few rows by a kernel that starts early, more by cuBLAS."""
        if x.shape[0] <= 16:
            self.kernels.skinny_matmul(x, weight, None, out)
        else:
            torch.mm(x, weight.t(), out=out)

    def run(self, between: Callable[[], None] = lambda: None) -> torch.Tensor:
        """The residual after three layers, in a tensor of its own; `between` is called after every kernel."""
        kernels, kv, rows = self.kernels, self.context.kv, self.context.first_rows
        for buffer in (self.hidden, self.qkv, self.attention, self.gate_up, self.activated):
            buffer.fill_(float("nan"))
        self.residual.copy_(self.x)
        q, k, v = self.qkv.split([WIDTH, 128, 128], dim=1)
        q, k, v = q.view(-1, 8, 64), k.view(-1, 2, 64), v.view(-1, 2, 64)
        tables = self.cos, self.sin, self.positions
        steps: list[Callable[[], object]] = [
            lambda: self.multiply(self.hidden, self.qkv_weight, self.qkv),
            lambda: kernels.rotary_and_kv_write(q, k, v, *tables, kv, rows, None, None, 1e-5),
            lambda: kernels.decode_attention(q, kv, rows, self.lens, 0.125, self.workspace, self.attention),
            lambda: self.multiply(self.attention.flatten(1), self.out_weight, self.hidden),
            lambda: kernels.add_rms_norm(self.hidden, self.residual, self.norm, 1e-5, out=self.hidden),
            lambda: self.multiply(self.hidden, self.gate_up_weight, self.gate_up),
            lambda: kernels.silu_and_mul(self.gate_up, out=self.activated),
            lambda: self.multiply(self.activated, self.down_weight, self.hidden),
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
