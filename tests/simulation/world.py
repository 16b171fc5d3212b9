"""An engine in virtual time as benchmarks drive one: hours of traffic without a GPU, the same every time.

The engine is `engine.simulation.SimulatedEngine`; here stand a model's shape and a device for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from engine.calibration import Calibration, StepRates
from engine.config import EngineConfig, MemoryConfig, ModelSource, SchedulerConfig, SloConfig
from engine.memory.arena import BufferSpec
from engine.memory.kv_geometry import KvGeometry
from engine.memory.vmm import VirtualMemory
from engine.messages import GenerateRequest, SamplingParams
from engine.simulation import EngineShape, Gpu
from engine.simulation import SimulatedEngine as EngineInVirtualTime
from tests.bench.in_process import EngineStepper

GIB = 1 << 30
CHUNK_BYTES = 2 << 20
_PIN_S = 0.67  # a GiB (DESIGN.md 8)

# Llama-3.1-8B in bf16 on an H100: 16 GB of weights at 3.0 TB/s beside 1.2 ms of launches; 600 TFLOP/s in
# matrix products and 550 in attention; 128 KiB of KV a token at 2.95 TB/s; copies at 50 GiB/s (DESIGN.md 8).
H100_8B = Calibration(
    StepRates(6.6e-3, 16.1e9 / 600e12, 131072 / 2.95e12, 524288 / 550e12), 50 * GIB, _PIN_S, load_s=8.0
)


def specs_8b() -> tuple[BufferSpec, ...]:
    """Activations of Llama-3.1-8B: 0.8 GiB for 8,192 tokens."""
    return (
        BufferSpec("hidden", 4096, torch.bfloat16, "token"),
        BufferSpec("residual", 4096, torch.bfloat16, "token"),
        BufferSpec("gate_up", 28672, torch.bfloat16, "token", "mlp"),
        BufferSpec("activated", 14336, torch.bfloat16, "token", "mlp"),
        BufferSpec("logits", 128256, torch.bfloat16, "row", "head"),
    )


SHAPE_8B = EngineShape(
    KvGeometry.choose(32, 8, 128, 2, CHUNK_BYTES, None, 128),
    specs_8b(),
    torch.bfloat16,
    131_072,
    8_030_000_000,
    7_500_000_000,
    4096,
    2,
)


class SimulatedEngine(EngineStepper):
    """Implements `tests.bench.in_process.Stepper`.

    Args:
        pool_gib: device memory for KV and activations.
        balloon_gib: host memory; 0 is none.
        slab_gib: it grows and shrinks by; None is there at once, for good.
        gpu: that it shares with other engines; None is one of its own.
        vm: the driver; None makes as many chunks as are asked for.
        scheduler, slo, memory: of the engine.
        max_model_len: tokens of the longest sequence, if the pool holds as many.
        priority_of: a request's priority, by its id.
    """

    def __init__(
        self,
        pool_gib: float,
        balloon_gib: float = 0.0,
        scheduler: SchedulerConfig | None = None,
        slo: SloConfig | None = None,
        memory: MemoryConfig | None = None,
        max_model_len: int = 16_384,
        device: Calibration = H100_8B,
        priority_of: Callable[[str], int] = lambda request_id: 0,
        slab_gib: float | None = None,
        gpu: Gpu | None = None,
        vm: VirtualMemory | None = None,
    ) -> None:
        config = EngineConfig(
            ModelSource("simulated", "nowhere"),
            replace(
                memory or MemoryConfig(enable_prefix_caching=False),
                pool_bytes=int(pool_gib * GIB),
                balloon_slab_bytes=max(CHUNK_BYTES, int((slab_gib or balloon_gib) * GIB)),
            ),
            scheduler or SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=8192),
            slo=slo or SloConfig(),
            device="cuda",
        )
        if slab_gib is None:
            device = replace(device, pin_s_per_gib=0.0)
        made = EngineInVirtualTime(
            config,
            replace(SHAPE_8B, max_context=max_model_len),
            device,
            self.publish,
            int(balloon_gib * GIB),
            is_filled=True,
            gpu=gpu,
            vm=vm,
        )
        super().__init__(made.clock)
        self.clock, self.device = made.clock, made.device
        self.pool, self.copies = made.pool, made.copies
        self.scheduler, self.engine = made.scheduler, made.engine
        while slab_gib is None and self.snapshot.memory.balloon_physical < self.snapshot.memory.balloon_limit:
            made.step()
        self._priority_of = priority_of

    def submit(self, request_id: str, prompt: list[int], output_tokens: int) -> None:
        sampling = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
        priority = self._priority_of(request_id)
        self.engine.submit(GenerateRequest(request_id, tuple(prompt), sampling, priority=priority))
