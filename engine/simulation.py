"""One engine in virtual time: the real engine loop, scheduler and pool over a device that only takes time.

A door of this package, beside the actor: who plans for engines that are not there yet makes them here. What
is simulated are steps, by a calibration, and copies, by the bandwidth of a link. Tokens mean nothing;
lengths, memory and decisions are those of the engine that serves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from engine.calibration import Calibration, StepSeconds
from engine.config import EngineConfig
from engine.control import Order
from engine.core import Engine
from engine.errors import ConfigError
from engine.leaping import LeapingEngine, LeapingScheduler
from engine.memory.arena import BufferSpec
from engine.memory.balloon import Balloon
from engine.memory.kv_geometry import KvGeometry
from engine.memory.layer_wise import Offload
from engine.memory.pool import MemoryPool
from engine.memory.vmm import VirtualMemory
from engine.messages import EngineInfo, EngineSnapshot, GenerateRequest, StepPlan
from engine.model.buffers import activation_specs
from engine.model.loader import facts_on
from engine.model.sampler import Sampled, SampleRow
from engine.outlet import Publish
from engine.scheduler import Scheduler
from engine.simulated import (
    NullSlabs,
    SimulatedCopies,
    SimulatedWorker,
    UncheckedVirtualMemory,
    VirtualClock,
)
from engine.sizes import fit_model_len, kv_geometry
from engine.step_times import StepWork

GIB = 1 << 30
_VOCABULARY = 1 << 62  # token ids are labels here: equal prompts have equal ones
_SLOTS_PER_SEQUENCE = 4  # as `engine.build`
_UNMEASURED_POOL = 1 << 30  # of a CPU, as `engine.device`


@dataclass(frozen=True, slots=True)
class EngineShape:
    """What is known of an engine's model and memory without either being there; one rank's share.

    Attributes:
        specs: the buffers of a forward pass.
        max_context: tokens that the model was made for.
        num_weights: of the whole model; num_products: of them, those that every token is multiplied with.
        attention_width: elements of one token's queries in a layer, of the whole model.
        itemsize: bytes of a weight.
    """

    geometry: KvGeometry
    specs: tuple[BufferSpec, ...]
    dtype: torch.dtype
    max_context: int
    num_weights: int
    num_products: int
    attention_width: int
    itemsize: int

    @property
    def num_layers(self) -> int:
        return self.geometry.num_layers


def read_shape(config: EngineConfig) -> EngineShape:
    """The shape of an engine's model. A hub id may need the network, for its config.json alone.

    Raises:
        ModelLoadError: there is no such model, or it is not supported.
        ConfigError: the configuration does not fit it.
    """
    facts = facts_on(torch.device(config.device), config)
    model = facts.config
    attention = model.hidden_size * (2 * model.q_size + 2 * model.kv_size)
    layer = attention + 3 * model.hidden_size * model.intermediate_size
    products = model.num_layers * layer + model.vocab_size * model.hidden_size
    embedding = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size
    return EngineShape(
        kv_geometry(facts, config.memory),
        activation_specs(facts.shard, facts.dtype, facts.kernels),
        facts.dtype,
        model.max_context,
        products + embedding,
        products,
        model.q_size,
        facts.dtype.itemsize,
    )


class SimulatedEngine:
    """An engine, and the clock it lives by.

    Args:
        config: as of an engine that serves. `memory.pool_bytes` counts before the calibration's.
        shape: of the model.
        calibration: how long things take.
        publish: receives every delta.
        balloon_bytes: host memory that the balloon may have at first; 0 is none.
        host_room: bytes that the host can spare.
        clock: the engine's own.
        steps_ahead: steps launched before one has been read; None is as on the configured device.
        is_filled: the balloon is made from the start on, not as it is needed.
        gpu: that it shares with other engines; None is one of its own.
        vm: the driver; None makes as many chunks as are asked for.
        leaps: whether `leap` is to be of use; then the snapshot is taken when somebody asks for it.

    Raises:
        ConfigError: the pool cannot hold one sequence, or its size is not known.
    """

    def __init__(
        self,
        config: EngineConfig,
        shape: EngineShape,
        calibration: Calibration,
        publish: Publish,
        balloon_bytes: int = 0,
        host_room: Callable[[], int] = lambda: 1 << 60,
        clock: VirtualClock | None = None,
        *,
        steps_ahead: int | None = None,
        is_filled: bool = False,
        gpu: Gpu | None = None,
        vm: VirtualMemory | None = None,
        leaps: bool = False,
    ) -> None:
        self.clock = clock or VirtualClock()
        if steps_ahead is None:
            steps_ahead = 1 if config.device == "cuda" else 0
        num_chunks = pool_bytes(config, calibration) // shape.geometry.chunk_bytes
        longest = fit_model_len(config, shape.max_context, shape.geometry, shape.specs, num_chunks)
        self.device = _Device(calibration.steps, shape.num_layers, self.clock, gpu or Gpu())
        self.pool = _make_pool(config, shape, num_chunks, longest, vm)
        chunk_bytes = shape.geometry.chunk_bytes
        self.copies = SimulatedCopies(
            chunk_bytes, self.clock, calibration.link_bytes_s, lambda: self.device.idle_at, self.device.hold
        )
        if balloon_bytes >= chunk_bytes and config.memory.mode != "static":
            slab = min(config.memory.balloon_slab_bytes, balloon_bytes) // chunk_bytes
            balloon = Balloon(
                NullSlabs(),
                chunk_bytes,
                balloon_bytes // chunk_bytes,
                max(1, slab),
                host_room,
                self.clock,
                is_filled=is_filled,
                worker=SimulatedWorker(
                    self.clock, calibration.pin_s_per_gib * max(1, slab) * chunk_bytes / GIB
                ),
            )
            self.pool.add_balloon(balloon, self.copies)
        make = LeapingScheduler if leaps else Scheduler
        self.scheduler = make(config.scheduler, self.pool, longest, (), self.clock)
        info = _describe(config, shape, num_chunks, longest, calibration.load_s)
        if gpu is not None:
            info = replace(info, shared_device=gpu.name)
        parts = (
            *(config, info, self.pool, self.scheduler, self.device, self.device, publish, self.clock),
            steps_ahead,
        )
        self._leaping = LeapingEngine(calibration.steps, *parts) if leaps else None
        self.engine = self._leaping or Engine(*parts)

    @property
    def snapshot(self) -> EngineSnapshot:
        """After its newest step."""
        return self._leaping.renewed() if self._leaping else self.engine.snapshot

    @property
    def gap_s(self) -> float | None:
        """Seconds between two tokens of a leap, while they are published; None otherwise."""
        return self._leaping.gap_s if self._leaping else None

    @property
    def is_at_rest(self) -> bool:
        """Whether nothing changes until somebody asks for something; False if that is not known."""
        return self._leaping is not None and self._leaping.is_at_rest

    @property
    def calm_until_s(self) -> float:
        """Before that time nothing happens but next tokens, if nobody comes; now, if that cannot be told."""
        return self._leaping.calm_until() if self._leaping else self.clock()

    def leap(self, until_s: float) -> int:
        """Take all steps that begin before then, if nothing has to be decided in them; how many it were."""
        return self._leaping.leap(until_s) if self._leaping else 0

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence."""
        return self.engine.info.max_model_len

    def submit(self, request: GenerateRequest) -> None:
        """Queue a request. Raises RequestError and OverloadedError as the engine does."""
        if self._leaping is not None:
            self._leaping.launch_ahead()
        self.engine.submit(request)

    def apply(self, order: Order) -> None:
        """Leave an order for the next step."""
        self.engine.apply(order)

    def step(self) -> bool:
        """One turn of the engine's loop, which lets time pass; False if there was nothing to do."""
        return self.engine.step()


def pool_bytes(config: EngineConfig, calibration: Calibration) -> int:
    """Memory for KV and activations. Raises ConfigError if nobody says."""
    nbytes = config.memory.pool_bytes or calibration.pool_bytes
    if nbytes is None and config.device == "cpu":
        nbytes = _UNMEASURED_POOL
    if nbytes is None or nbytes <= 0:
        raise ConfigError(
            f"{config.model.model_id}: how much memory its pool has is not known: the weights leave "
            f"nothing of "
            "the GPU, or no GPU was named; give memory.pool_bytes, another --gpu, or a calibration"
        )
    return nbytes


def _describe(
    config: EngineConfig, shape: EngineShape, num_chunks: int, longest: int, load_s: float
) -> EngineInfo:
    return EngineInfo(
        config.model.model_id,
        config.device,
        str(shape.dtype).removeprefix("torch."),
        longest,
        _VOCABULARY,
        (),
        num_chunks * shape.geometry.chunk_bytes,
        shape.num_weights * shape.itemsize,
        shape.geometry.tokens_per_chunk,
        shape.geometry.layers_per_group,
        load_s,
    )


def _make_pool(
    config: EngineConfig, shape: EngineShape, num_chunks: int, longest: int, vm: VirtualMemory | None
) -> MemoryPool:
    memory, limits = config.memory, config.scheduler
    return MemoryPool(
        vm or UncheckedVirtualMemory(shape.geometry.chunk_bytes),
        num_chunks,
        memory.mode,
        shape.geometry,
        shape.specs,
        limits.max_num_seqs,
        longest,
        limits.largest_step,
        shape.dtype,
        num_slots=limits.max_num_seqs * (_SLOTS_PER_SEQUENCE if memory.enable_prefix_caching else 1),
        caches_prefixes=memory.enable_prefix_caching,
    )


class Gpu:
    """What computes one step after another, of one engine or of several.

    Attributes:
        name: on its node.
        idle_at: when the steps launched so far have ended.
    """

    def __init__(self, name: str = "GPU-0") -> None:
        self.name = name
        self.idle_at = 0.0


class _Device:
    """Implements `Runner` and `TokenSampler`: computes one step after another, and says token 1."""

    def __init__(self, steps: StepSeconds, num_layers: int, clock: VirtualClock, gpu: Gpu) -> None:
        self._steps = steps
        self._num_layers = num_layers
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
        seconds = self._steps.step_s(StepWork.of(plan))
        if offload is None:
            self.idle_at += seconds
        else:
            for layer in range(self._num_layers):
                offload.before(layer)
                self.idle_at += seconds / self._num_layers
                offload.after(layer)
        self.num_steps += 1
        return _NO_LOGITS

    def hold(self, until: float) -> None:
        """Nothing that is launched later goes on before."""
        self.idle_at = max(self.idle_at, until)

    def synchronize(self) -> None:
        self._clock.advance_to(self.idle_at)

    def finished(self, step: int) -> None:
        pass

    def launch(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> _Tokens:
        return _Tokens(len(rows), self.idle_at, self._clock)


_NO_LOGITS = torch.empty(0)


class _Tokens:
    def __init__(self, count: int, ready_at: float, clock: VirtualClock) -> None:
        self._count = count
        self._ready_at = ready_at
        self._clock = clock

    def wait(self) -> list[Sampled]:
        self._clock.advance_to(self._ready_at)
        return [Sampled(1)] * self._count
