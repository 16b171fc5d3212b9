"""The real scheduler and the real pool in virtual time: hours of traffic without a GPU, the same every time.

Only what takes time is simulated: steps, by a model of what a device needs for them, and copies, by the
bandwidth of a link. Tokens mean nothing; lengths, memory and decisions are those of the engine that serves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from engine.config import EngineConfig, MemoryConfig, ModelSource, SchedulerConfig, SloConfig
from engine.core import Engine
from engine.memory.arena import BufferSpec
from engine.memory.balloon import Balloon
from engine.memory.kv_geometry import KvGeometry
from engine.memory.layer_wise import Offload
from engine.memory.pool import MemoryPool
from engine.memory.vmm import VirtualMemory
from engine.messages import EngineInfo, GenerateRequest, SamplingParams, StepPlan
from engine.model.sampler import Sampled, SampleRow
from engine.scheduler import Scheduler
from engine.simulated import NullSlabs, NullVirtualMemory, SimulatedCopies, SimulatedWorker, VirtualClock
from tests.bench.in_process import EngineStepper

GIB = 1 << 30
CHUNK_BYTES = 2 << 20
_NUM_LAYERS = 32
_STEPS_AHEAD = 1  # as on a GPU
_PIN_S = 0.67  # a GiB (DESIGN.md 8)


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, and a model's shape on it.

    Attributes:
        read_s: a step's least time: the weights are read once, and kernels are launched.
        token_s: for each token of a step, in matrix products.
        kv_read_s: for each token of a decode's context.
        pair_s: for each pair of a prompt's token and one before it.
        link_bytes_s: of copies, each way.
    """

    read_s: float
    token_s: float
    kv_read_s: float
    pair_s: float
    link_bytes_s: float

    def step_s(self, plan: StepPlan) -> float:
        """Seconds a step takes."""
        decoded = sum(piece.start + 1 for piece in plan.pieces[: plan.num_decodes])
        pairs = sum(
            len(piece.token_ids) * (piece.start + len(piece.token_ids) / 2)
            for piece in plan.pieces[plan.num_decodes :]
        )
        products = max(self.read_s, plan.num_tokens * self.token_s)
        return products + decoded * self.kv_read_s + pairs * self.pair_s


# Llama-3.1-8B in bf16 on an H100: 16 GB of weights at 3.0 TB/s beside 1.2 ms of launches; 600 TFLOP/s in
# matrix products and 550 in attention; 128 KiB of KV a token at 2.95 TB/s; copies at 50 GiB/s (DESIGN.md 8).
H100_8B = Device(6.6e-3, 16.1e9 / 600e12, 131072 / 2.95e12, 524288 / 550e12, 50 * GIB)


class Gpu:
    """What computes one step after another, of one engine or of several.

    Attributes:
        idle_at: when the steps launched so far have ended.
    """

    def __init__(self) -> None:
        self.idle_at = 0.0


class _Device:
    """Implements `Runner` and `TokenSampler`: computes one step after another, and says token 1."""

    def __init__(self, device: Device, clock: VirtualClock, gpu: Gpu) -> None:
        self._device = device
        self._clock = clock
        self._gpu = gpu
        self.num_steps = 0

    @property
    def idle_at(self) -> float:
        return self._gpu.idle_at

    @idle_at.setter
    def idle_at(self, at: float) -> None:
        self._gpu.idle_at = at

    def run(self, plan: StepPlan, offload: Offload | None = None) -> torch.Tensor:
        self.idle_at = max(self.idle_at, self._clock())
        if offload is None:
            self.idle_at += self._device.step_s(plan)
        else:
            for layer in range(_NUM_LAYERS):
                offload.before(layer)
                self.idle_at += self._device.step_s(plan) / _NUM_LAYERS
                offload.after(layer)
        self.num_steps += 1
        return torch.empty(0)

    def hold(self, until: float) -> None:
        """Nothing that is launched later goes on before."""
        self.idle_at = max(self.idle_at, until)

    def synchronize(self) -> None:
        self._clock.advance_to(self.idle_at)

    def finished(self, step: int) -> None:
        pass

    def launch(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> _Tokens:
        return _Tokens(len(rows), self.idle_at, self._clock)


class _Tokens:
    def __init__(self, count: int, ready_at: float, clock: VirtualClock) -> None:
        self._count = count
        self._ready_at = ready_at
        self._clock = clock

    def wait(self) -> list[Sampled]:
        self._clock.advance_to(self._ready_at)
        return [Sampled(1)] * self._count


def specs_8b() -> tuple[BufferSpec, ...]:
    """Activations of Llama-3.1-8B: 0.8 GiB for 8,192 tokens."""
    return (
        BufferSpec("hidden", 4096, torch.bfloat16, "token"),
        BufferSpec("residual", 4096, torch.bfloat16, "token"),
        BufferSpec("gate_up", 28672, torch.bfloat16, "token", "mlp"),
        BufferSpec("activated", 14336, torch.bfloat16, "token", "mlp"),
        BufferSpec("logits", 128256, torch.bfloat16, "row", "head"),
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
        device: Device = H100_8B,
        priority_of: Callable[[str], int] = lambda request_id: 0,
        slab_gib: float | None = None,
        gpu: Gpu | None = None,
        vm: VirtualMemory | None = None,
    ) -> None:
        scheduler = scheduler or SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=8192)
        memory = memory or MemoryConfig(enable_prefix_caching=False)
        config = EngineConfig(ModelSource("simulated", "nowhere"), memory, scheduler, slo=slo or SloConfig())
        self.clock = VirtualClock()
        super().__init__(self.clock)
        self.device = _Device(device, self.clock, gpu or Gpu())
        geometry = KvGeometry.choose(_NUM_LAYERS, 8, 128, 2, CHUNK_BYTES, None, 128)
        total = int(pool_gib * GIB) // CHUNK_BYTES
        self.pool = MemoryPool(
            vm or NullVirtualMemory(CHUNK_BYTES),
            total,
            memory.mode,
            geometry,
            specs_8b(),
            scheduler.max_num_seqs,
            max_model_len,
            scheduler.largest_step,
            torch.bfloat16,
            num_slots=4 * scheduler.max_num_seqs,
            caches_prefixes=memory.enable_prefix_caching,
        )
        self.copies = SimulatedCopies(
            CHUNK_BYTES, self.clock, device.link_bytes_s, lambda: self.device.idle_at, self.device.hold
        )
        if balloon_gib:
            self.pool.add_balloon(_balloon(balloon_gib, slab_gib, self.clock), self.copies)
        shared = "GPU-0" if gpu else ""
        facts = "simulated", "none", "bfloat16", max_model_len, 1 << 20, (0,)
        info = EngineInfo(*facts, 0, 0, 0, 0, 0.0, shared)
        self.scheduler = Scheduler(scheduler, self.pool, max_model_len, (0,), self.clock)
        self.engine = Engine(
            config,
            info,
            self.pool,
            self.scheduler,
            self.device,
            self.device,
            self.publish,
            self.clock,
            _STEPS_AHEAD,
        )
        self._priority_of = priority_of

    def submit(self, request_id: str, prompt: list[int], output_tokens: int) -> None:
        sampling = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
        priority = self._priority_of(request_id)
        self.engine.submit(GenerateRequest(request_id, tuple(prompt), sampling, priority=priority))


def _balloon(gib: float, slab_gib: float | None, clock: VirtualClock) -> Balloon:
    """Host memory. Without slabs it is there at once, so that a run does not depend on a thread's pace."""
    chunks, room = int(gib * GIB) // CHUNK_BYTES, 1 << 60
    if slab_gib is not None:
        slab = int(slab_gib * GIB) // CHUNK_BYTES
        worker = SimulatedWorker(clock, _PIN_S * slab_gib)
        return Balloon(
            NullSlabs(), CHUNK_BYTES, chunks, slab, lambda: room, clock, is_filled=True, worker=worker
        )
    balloon = Balloon(NullSlabs(), CHUNK_BYTES, chunks, chunks, host_room=lambda: room)
    balloon.grow_ahead()
    while balloon.num_physical < chunks:
        balloon.grow_ahead()
    return balloon
