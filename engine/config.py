"""Configuration of one engine: frozen, complete, made once.

`cluster.config` reads YAML and builds these; nothing below it reads the environment or a file.
Fields that mean the same as in vLLM or in Ray's LLMConfig carry the same name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from engine.errors import ConfigError

MIB = 1 << 20
DEFAULT_STEP_TIMEOUT_S = 300.0

Device = Literal["cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]
Mode = Literal["elastic", "virtual", "static"]
Policy = Literal["slo", "fcfs"]
OnOverload = Literal["queue", "shed"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        model_id: the name clients use.
        source: a directory, a `.gguf` file or a hub id.
        tokenizer_source: the same for the tokenizer; None means `source`.
        load_format: `auto` looks at the source; `dummy` needs only the configuration and makes
            random weights of the right shape on the device.
        dtype: `auto` is float32 on a CPU and the checkpoint's type (bfloat16 for GGUF) on a GPU.
        seed: of the dummy weights.
    """

    model_id: str
    source: str
    tokenizer_source: str | None = None
    load_format: LoadFormat = "auto"
    dtype: Dtype = "auto"
    seed: int = 0


@dataclass(frozen=True, slots=True)
class MemoryConfig:
    """The elastic pool.

    Attributes:
        mode: `elastic` lets KV cache and activations share every chunk. `virtual` backs KV on demand
            too, but sets the largest activation aside at start, as paged engines commonly do. `static`
            also backs every slot for the longest sequence at start, as engines did before paging. The
            last two are baselines to measure against.
        pool_bytes: physical memory of the pool; None measures what is free after the weights (GPU)
            or takes 1 GiB (CPU).
        device_share: part of the device's memory that the engine has at its start, weights included, less the
            margin. With less than 1 it shares the device with others, and a controller moves memory between
            their pools (`engine.orders`). On a CPU, where weights are not counted: the pool's part of what
            all pools of the node may come to.
        chunk_bytes: size of a chunk; None is 2 MiB on a GPU (the driver's granularity) and 512 KiB
            on a CPU.
        layers_per_group: layers whose KV shares a chunk; None applies the rule of `KvGeometry`.
        margin_bytes: GPU memory that the pool never takes: temporaries of torch and of the driver live
            there. Looked at whenever chunks are made, so a process beside this one is heeded too.
        enable_prefix_caching: keep the KV of what was computed for prompts that begin alike. Only in
            the modes that back KV on demand.
        map_ahead_tokens: a running sequence's next chunks are mapped, beside the steps, when so few
            tokens are left in the ones it has; 0 maps when they are needed.
        trim_after_s: seconds without work after which free chunks go back to the device; None keeps
            them. What they hold of prefixes stays.
        balloon_bytes: host memory that KV of sequences may move to while others run (the balloon). 0 switches
            it off. None is a share of what the host has available at start on a GPU, taken in slabs as it
            is needed, and 0 on a CPU, where both memories are the same. What is given as a number is taken
            from the start on, beside the requests: a GPU's host memory is pinned at 1.5 GiB/s. A controller
            moves it between the groups of a node later (`engine.orders`).
        balloon_share: that share. Groups on one node must not have more than all of it together.
        balloon_slab_bytes: host memory that the balloon grows and shrinks by at a time.
    """

    mode: Mode = "elastic"
    pool_bytes: int | None = None
    device_share: float = 1.0
    chunk_bytes: int | None = None
    layers_per_group: int | None = None
    margin_bytes: int = 1024 * MIB
    enable_prefix_caching: bool = True
    map_ahead_tokens: int = 32
    trim_after_s: float | None = 300.0
    balloon_bytes: int | None = None
    balloon_share: float = 0.5
    balloon_slab_bytes: int = 256 * MIB

    def __post_init__(self) -> None:
        if self.pool_bytes is not None and self.pool_bytes <= 0:
            raise ConfigError(f"memory.pool_bytes must be positive, not {self.pool_bytes}")
        if not 0 < self.device_share <= 1:
            raise ConfigError(f"memory.device_share must be above 0 and at most 1, not {self.device_share}")
        if self.device_share < 1 and self.mode != "elastic":
            raise ConfigError(
                f"memory.mode {self.mode} sets memory aside for good, and an engine with memory.device_share "
                f"{self.device_share:g} has to lend it: set mode to elastic, or leave device_share out"
            )
        if self.chunk_bytes is not None and (self.chunk_bytes <= 0 or self.chunk_bytes % 4096):
            raise ConfigError(f"memory.chunk_bytes must be a multiple of 4096, not {self.chunk_bytes}")
        if self.map_ahead_tokens < 0:
            raise ConfigError(f"memory.map_ahead_tokens must be at least 0, not {self.map_ahead_tokens}")
        if self.trim_after_s is not None and self.trim_after_s < 0:
            raise ConfigError(f"memory.trim_after_s must be at least 0, not {self.trim_after_s}")
        if self.balloon_bytes is not None and self.balloon_bytes < 0:
            raise ConfigError(f"memory.balloon_bytes must be at least 0, not {self.balloon_bytes}")
        if not 0 < self.balloon_share <= 1:
            raise ConfigError(f"memory.balloon_share must be above 0 and at most 1, not {self.balloon_share}")
        if self.balloon_slab_bytes <= 0:
            raise ConfigError(f"memory.balloon_slab_bytes must be positive, not {self.balloon_slab_bytes}")


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one step and of the queue.

    Attributes:
        max_num_seqs: sequences that may hold KV at once; also the number of slots.
        max_num_batched_tokens: tokens of one step, decodes and prefill pieces together.
        prefill_piece_tokens: tokens of one prompt in one step; None is limited by the step alone.
        prefill_spread_steps: about so many steps, beside decodes, are taken to compute the prompts that
            wait, a quarter of that for one prompt by itself; fewer the more sequences decode. 1 fills every
            step.
        max_prefill_tokens: tokens of a step that no decode waits for, if memory allows: a prompt may
            then be computed in pieces up to this size. None is `max_num_batched_tokens`.
        max_overtaken: requests with at most half as much to compute that may start before one that came
            first, while that one could only start at the cost of KV that waiting requests will read. 0 is
            strictly first come, first served.
        max_num_queued_reqs: requests that may wait beside those that run; one more is refused as
            overload.
        policy: `slo` spends memory so that first tokens and next tokens keep their deadlines
            (`SloConfig`): sequences that are ahead of their clients give their place on the GPU to others
            for a while. `fcfs` never takes a sequence's place while there is memory for it; the
            baseline to measure against.
        turn_tokens: how far a sequence should get, ahead of its client, before another one that is
            further behind takes its turn on the GPU.
        min_retained_chunks: a parked sequence keeps layer groups on the GPU only if so many of its chunks
            can stay; otherwise it leaves wholly, and its slot with all that is mapped there serves another.
        layer_wise: a prompt that nobody can make room for, and that a step can compute in one piece, is
            computed layer by layer, each leaving for the balloon at once; then it waits there.
        deposit: while sequences take turns, tokens that come sooner than `tpot_ms` asks for are held
            back and handed out at that pace, so that no client sees a turn of others as a pause. Without,
            clients get tokens as soon as they exist.
        on_overload: `queue` lets requests wait however long the line is, up to `max_num_queued_reqs`;
            `shed` refuses at once those whose first token would come too late, with the time after which
            one more would be in time.
        feedback_window, feedback_breaches, feedback_factor, feedback_dwell_steps: if so many of that many
            steps were too late for somebody, the room for new prompts in the balloon, and in a step, changes
            by that factor, and then not for so many steps (eLLM: 5, 3, 2).
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    prefill_piece_tokens: int | None = None
    prefill_spread_steps: int = 16
    max_prefill_tokens: int | None = None
    max_overtaken: int = 64
    max_num_queued_reqs: int = 1024
    policy: Policy = "slo"
    turn_tokens: int = 64
    min_retained_chunks: int = 1024
    layer_wise: bool = True
    deposit: bool = True
    on_overload: OnOverload = "queue"
    feedback_window: int = 5
    feedback_breaches: int = 3
    feedback_factor: float = 2.0
    feedback_dwell_steps: int = 20

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1:
            raise ConfigError(f"max_num_seqs must be at least 1, not {self.max_num_seqs}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): every running sequence needs one token a step"
            )
        if self.prefill_piece_tokens is not None and self.prefill_piece_tokens < 1:
            raise ConfigError(f"prefill_piece_tokens must be at least 1, not {self.prefill_piece_tokens}")
        if self.prefill_spread_steps < 1:
            raise ConfigError(f"prefill_spread_steps must be at least 1, not {self.prefill_spread_steps}")
        if not 1 <= self.feedback_breaches <= self.feedback_window:
            raise ConfigError(
                f"feedback_breaches must be 1 to feedback_window ({self.feedback_window}), not "
                f"{self.feedback_breaches}"
            )
        if self.feedback_factor <= 1:
            raise ConfigError(f"feedback_factor must be above 1, not {self.feedback_factor}")
        if self.feedback_dwell_steps < 0:
            raise ConfigError(f"feedback_dwell_steps must be at least 0, not {self.feedback_dwell_steps}")
        if self.turn_tokens < 1:
            raise ConfigError(f"turn_tokens must be at least 1, not {self.turn_tokens}")
        if self.min_retained_chunks < 0:
            raise ConfigError(f"min_retained_chunks must be at least 0, not {self.min_retained_chunks}")
        if self.max_overtaken < 0:
            raise ConfigError(f"max_overtaken must be at least 0, not {self.max_overtaken}")
        if self.max_prefill_tokens is not None and self.max_prefill_tokens < self.max_num_batched_tokens:
            raise ConfigError(
                f"max_prefill_tokens ({self.max_prefill_tokens}) must be at least max_num_batched_tokens "
                f"({self.max_num_batched_tokens})"
            )

    @property
    def largest_step(self) -> int:
        """Tokens of the largest step there can be."""
        return self.max_prefill_tokens or self.max_num_batched_tokens


@dataclass(frozen=True, slots=True)
class SloConfig:
    """What a model's users are promised; a request may bring its own (`GenerateRequest`).

    Attributes:
        ttft_ms: from the arrival of a request to its first token.
        tpot_ms: from a token to the next, on average over a request's answer.
    """

    ttft_ms: float = 2000.0
    tpot_ms: float = 100.0

    def __post_init__(self) -> None:
        for name, value in (("ttft_ms", self.ttft_ms), ("tpot_ms", self.tpot_ms)):
            if not 0 < value < float("inf"):
                raise ConfigError(f"slo.{name} must be positive, not {value}")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything one engine needs to start.

    Attributes:
        device: where the model runs. `cpu` is served by HostVirtualMemory and the reference kernels.
        max_model_len: longest sequence, prompt and output together; None is the model's own limit,
            or what fits the pool if that is less.
        num_threads: CPU threads of torch; None leaves torch's own choice.
        enforce_eager: launch every kernel from Python instead of replaying CUDA graphs. Slower; shows
            in a profile or a stack trace where something happens.
        tensor_parallel_size: devices that hold one copy of the model together.
        step_timeout_s: an engine of which no step has ended for so long is given up and replaced. Longer
            than the longest step: a prompt of the largest piece, on a CPU minutes.
    """

    model: ModelSource
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    slo: SloConfig = field(default_factory=SloConfig)
    device: Device = "cpu"
    max_model_len: int | None = None
    num_threads: int | None = None
    enforce_eager: bool = False
    tensor_parallel_size: int = 1
    step_timeout_s: float = DEFAULT_STEP_TIMEOUT_S

    def __post_init__(self) -> None:
        if self.tensor_parallel_size < 1:
            raise ConfigError(f"tensor_parallel_size must be at least 1, not {self.tensor_parallel_size}")
        if self.tensor_parallel_size > 1 and self.memory.device_share < 1:
            raise ConfigError(
                f"memory.device_share is {self.memory.device_share:g} and tensor_parallel_size is "
                f"{self.tensor_parallel_size}: the ranks of a group have their devices alone: leave one of "
                "the two out"
            )
        if not self.step_timeout_s > 0:
            raise ConfigError(f"step_timeout_s must be positive, not {self.step_timeout_s}")
