"""The YAML file: a Ray Serve config file whose `args` are ours.

Names follow Ray's LLMServingArgs and LLMConfig, so that a Ray LLM file ports by changing its
`import_path`. What an engine field means stands in `engine.config`, once; what a `deployment_config`
field means stands in Ray Serve's documentation. `cluster.config_ingress` is the HTTP side,
`cluster.config_values` reads sizes and paths, `cluster.config_source` finds the config in a file,
`cluster.config_errors` words what can go wrong; no other file reads the environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from cluster.config_errors import explain
from cluster.config_ingress import ENVIRONMENT, IngressSection
from cluster.config_sharing import check_cpu_parts, check_reserved, device_share
from cluster.config_source import ConfigSource, read
from cluster.config_values import Bytes, Section, Source
from cluster.policy import PolicyConfig
from engine.config import (
    DEFAULT_STEP_TIMEOUT_S,
    Device,
    Dtype,
    EngineConfig,
    LoadFormat,
    MemoryConfig,
    Mode,
    ModelSource,
    OnOverload,
    Policy,
    SloConfig,
)
from engine.config import SchedulerConfig as EngineSchedulerConfig
from engine.errors import ConfigError

# The defaults stand in engine.config alone.
_SCHEDULER, _MEMORY, _SLO = EngineSchedulerConfig(), MemoryConfig(), SloConfig()
_POLICY = PolicyConfig()
_SCHEDULER_FIELDS = {field.name for field in fields(EngineSchedulerConfig)}

Share = Annotated[float, Field(ge=0, le=1)]
Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ModelLoadingConfig(Section):
    """`model_source` is a directory, a `.gguf` file or a hub id; without it `model_id` is the hub id."""

    model_id: str = Field(min_length=1)
    model_source: Source | None = None
    tokenizer_source: Source | None = None


class EngineKwargs(Section):
    """`engine.config.SchedulerConfig`, `ModelSource` and `EngineConfig` under vLLM's names.

    `device: auto` is cuda where the Ray cluster has GPUs when the application is built, or where one of its
    models asks for some (`device: cuda`, `accelerator_type`, GPUs in `bundle_per_worker`), else cpu: write
    cuda where GPU nodes join later, as under KubeRay. `enable_prefix_caching` is `MemoryConfig`'s; it has no
    effect where `memory.mode` is static. `tensor_parallel_size` devices of one
    node hold a copy of the model together; `memory` is then what each of them has.
    """

    max_model_len: PositiveInt | None = None
    max_num_seqs: PositiveInt = _SCHEDULER.max_num_seqs
    max_num_batched_tokens: PositiveInt = _SCHEDULER.max_num_batched_tokens
    prefill_piece_tokens: PositiveInt | None = None
    prefill_spread_steps: PositiveInt = _SCHEDULER.prefill_spread_steps
    max_prefill_tokens: PositiveInt | None = None
    max_overtaken: NonNegativeInt = _SCHEDULER.max_overtaken
    max_num_queued_reqs: PositiveInt = _SCHEDULER.max_num_queued_reqs
    policy: Policy = _SCHEDULER.policy
    turn_tokens: PositiveInt = _SCHEDULER.turn_tokens
    min_retained_chunks: NonNegativeInt = _SCHEDULER.min_retained_chunks
    layer_wise: bool = _SCHEDULER.layer_wise
    deposit: bool = _SCHEDULER.deposit
    on_overload: OnOverload = _SCHEDULER.on_overload
    feedback_window: PositiveInt = _SCHEDULER.feedback_window
    feedback_breaches: PositiveInt = _SCHEDULER.feedback_breaches
    feedback_factor: PositiveFloat = _SCHEDULER.feedback_factor
    feedback_dwell_steps: NonNegativeInt = _SCHEDULER.feedback_dwell_steps
    enable_prefix_caching: bool = _MEMORY.enable_prefix_caching
    dtype: Dtype = "auto"
    load_format: LoadFormat = "auto"
    seed: int = 0
    tensor_parallel_size: PositiveInt = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: PositiveInt | None = None
    enforce_eager: bool = False
    step_timeout_s: PositiveFloat = DEFAULT_STEP_TIMEOUT_S


class MemorySection(Section):
    """`engine.config.MemoryConfig`; sizes may be written as `512MiB`.

    `device_share` is by default the `GPU` of `placement_group_config.bundle_per_worker`, where that is a
    fraction, and the other way round. `balloon_share` is by default an equal part for as many engines as
    may come to one node.
    """

    mode: Mode = _MEMORY.mode
    pool_bytes: Bytes | None = None
    device_share: float | None = Field(default=None, gt=0, le=1)
    chunk_bytes: Bytes | None = None
    layers_per_group: PositiveInt | None = None
    margin_bytes: Bytes = _MEMORY.margin_bytes
    map_ahead_tokens: NonNegativeInt = _MEMORY.map_ahead_tokens
    trim_after_s: NonNegativeFloat | None = _MEMORY.trim_after_s
    balloon_bytes: Bytes | None = _MEMORY.balloon_bytes
    balloon_share: float | None = Field(default=None, gt=0, le=1)
    balloon_slab_bytes: Bytes = _MEMORY.balloon_slab_bytes


class SloSection(Section):
    """`engine.config.SloConfig`: what holds for requests that bring no objectives of their own."""

    ttft_ms: Milliseconds = _SLO.ttft_ms
    tpot_ms: Milliseconds = _SLO.tpot_ms


class PlacementGroupConfig(Section):
    """Resources of one rank of a group; without it one CPU share, and one GPU on cuda."""

    bundle_per_worker: dict[str, float] = Field(min_length=1)
    strategy: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = "STRICT_PACK"


class AutoscalingSection(Section):
    """Ray Serve's autoscaling_config; a key that is left out keeps Serve's default."""

    min_replicas: NonNegativeInt | None = None
    initial_replicas: NonNegativeInt | None = None
    max_replicas: PositiveInt | None = None
    target_ongoing_requests: PositiveFloat | None = None
    look_back_period_s: PositiveFloat | None = None
    metrics_interval_s: PositiveFloat | None = None
    upscale_delay_s: NonNegativeFloat | None = None
    downscale_delay_s: NonNegativeFloat | None = None
    upscaling_factor: PositiveFloat | None = None
    downscaling_factor: PositiveFloat | None = None


class DeploymentSection(Section):
    """Ray Serve's options of one model's groups, with defaults that suit long streams.

    `max_ongoing_requests` and `max_queued_requests` are by default well above what the engine runs
    and queues, so that requests wait in one place, the engine's queue, and the engine refuses what
    exceeds it (429). A group that leaves, at an update or a shutdown, has `graceful_shutdown_timeout_s` to
    finish what it has begun; `health_check_period_s` is how soon a group that died is missed.
    """

    num_replicas: PositiveInt | Literal["auto"] | None = None
    autoscaling_config: AutoscalingSection | None = None
    max_ongoing_requests: PositiveInt | None = None
    max_queued_requests: PositiveInt | None = None
    graceful_shutdown_timeout_s: PositiveFloat = 600.0
    graceful_shutdown_wait_loop_s: PositiveFloat = 2.0
    health_check_period_s: PositiveFloat = 2.0
    health_check_timeout_s: PositiveFloat = 30.0
    max_constructor_retry_count: PositiveInt = 3

    @model_validator(mode="after")
    def _one_way_to_scale(self) -> Self:
        if isinstance(self.num_replicas, int) and self.autoscaling_config is not None:
            raise ValueError("num_replicas and autoscaling_config exclude each other")
        return self


class LLMConfig(Section):
    """One model and how it is served."""

    model_loading_config: ModelLoadingConfig
    accelerator_type: str | None = None
    engine_kwargs: EngineKwargs = EngineKwargs()
    memory: MemorySection = MemorySection()
    slo: SloSection = SloSection()
    placement_group_config: PlacementGroupConfig | None = None
    deployment_config: DeploymentSection = DeploymentSection()

    @property
    def model_id(self) -> str:
        return self.model_loading_config.model_id

    @property
    def model_source(self) -> str:
        """Where the weights are."""
        return self.model_loading_config.model_source or self.model_id

    @property
    def tokenizer_source(self) -> str:
        """Where the tokenizer is."""
        return self.model_loading_config.tokenizer_source or self.model_source

    @property
    def device_share(self) -> float:
        """Part of a device that each engine starts with; less than 1 if it shares the device."""
        return device_share(self.memory.device_share, self._reserved_gpu)

    @property
    def _reserved_gpu(self) -> float | None:
        placement = self.placement_group_config
        return None if placement is None else placement.bundle_per_worker.get("GPU", 0.0)

    @property
    def most_ranks(self) -> int:
        """Engines that may run at once."""
        options = self.deployment_config
        most = options.num_replicas if isinstance(options.num_replicas, int) else 1
        if options.autoscaling_config is not None:
            most = options.autoscaling_config.max_replicas or options.autoscaling_config.min_replicas or most
        return most * self.engine_kwargs.tensor_parallel_size

    @model_validator(mode="after")
    def _ranks_share_a_node(self) -> Self:
        placement, size = self.placement_group_config, self.engine_kwargs.tensor_parallel_size
        if size > 1 and placement is not None and placement.strategy != "STRICT_PACK":
            raise ValueError(
                f"placement_group_config.strategy is {placement.strategy}, and the {size} ranks of a group "
                "have to share a node: leave it out, or say STRICT_PACK"
            )
        return self

    @model_validator(mode="after")
    def _reserves_what_it_takes(self) -> Self:
        check_reserved(self.memory.device_share, self._reserved_gpu, self.engine_kwargs.tensor_parallel_size)
        return self

    @model_validator(mode="after")
    def _engine_agrees(self) -> Self:
        try:
            to_engine_config(self, "cpu")
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self


class ControllerSection(Section):
    """What divides each node's host memory among the balloons of its groups, and each shared device among the
    pools on it, and weighs groups.

    `enabled: false` only looks, for the metrics: every balloon stays as it was made. `tick_s`: seconds
    between two looks at all groups. The others are `cluster.policy.PolicyConfig`'s.
    """

    enabled: bool = True
    tick_s: PositiveFloat = 1.0
    host_memory_bytes: Bytes | None = _POLICY.host_memory_bytes
    reserve: Share = _POLICY.reserve
    floor: Share = _POLICY.floor
    headroom: float = Field(default=_POLICY.headroom, ge=1)
    need_half_life_s: PositiveFloat = _POLICY.need_half_life_s
    dead_band: Share = _POLICY.dead_band
    dwell_s: NonNegativeFloat = _POLICY.dwell_s
    device_dwell_s: NonNegativeFloat = _POLICY.device_dwell_s
    device_half_life_s: PositiveFloat = _POLICY.device_half_life_s
    target: Share = _POLICY.target
    patience_s: NonNegativeFloat = _POLICY.patience_s
    least_weight: float = Field(default=_POLICY.least_weight, gt=0, le=1)
    recovery: PositiveFloat = _POLICY.recovery
    replica_patience_s: PositiveFloat = _POLICY.replica_patience_s
    compute_patience_s: PositiveFloat = _POLICY.compute_patience_s
    replica_idle_s: PositiveFloat = _POLICY.replica_idle_s
    forget_s: PositiveFloat = _POLICY.forget_s

    def policy(self) -> PolicyConfig | None:
        """The constants of the decisions; None if it is to look only."""
        return PolicyConfig(**self.model_dump(exclude={"enabled", "tick_s"})) if self.enabled else None


class ServingArgs(Section):
    """The `args` of one application."""

    llm_configs: tuple[LLMConfig, ...] = Field(min_length=1, strict=False)
    ingress: IngressSection = IngressSection()
    controller: ControllerSection = ControllerSection()

    @model_validator(mode="after")
    def _parts_of_a_cpu(self) -> Self:
        on_cpu = [
            llm for llm in self.llm_configs if llm.engine_kwargs.device == "cpu" and llm.device_share < 1
        ]
        check_cpu_parts([(llm.model_id, llm.device_share * llm.most_ranks) for llm in on_cpu])
        return self

    @model_validator(mode="after")
    def _distinct_models(self) -> Self:
        model_ids = [llm.model_id for llm in self.llm_configs]
        if doubles := {model_id for model_id in model_ids if model_ids.count(model_id) > 1}:
            raise ValueError(f"llm_configs: model_id {', '.join(sorted(doubles))} appears more than once")
        return self


class ApplicationSection(Section):
    """One Serve application."""

    import_path: Literal["cluster.app:build"]
    args: ServingArgs
    name: str = Field(default="ballonet", min_length=1)
    route_prefix: str = "/"


class HttpSection(Section):
    """Ray Serve's http_options. `ballonet serve` listens on this host only unless `host` says otherwise."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    root_path: str = ""
    request_timeout_s: PositiveFloat | None = None
    keep_alive_timeout_s: PositiveInt = 90


class ServeFile(Section):
    """The whole file."""

    applications: tuple[ApplicationSection, ...] = Field(min_length=1, strict=False)
    http_options: HttpSection = HttpSection()
    proxy_location: Literal["EveryNode", "HeadOnly", "Disabled"] = "EveryNode"
    logging_config: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _distinct_applications(self) -> Self:
        for what in ("name", "route_prefix"):
            values = [getattr(application, what) for application in self.applications]
            if len(set(values)) < len(values):
                raise ValueError(f"applications: two of them have the same {what}")
        return self


T = TypeVar("T", bound=Section)


def validate(section: type[T], data: object, environment: Mapping[str, str] | None = None) -> T:
    """`data` as a `section`. Raises ConfigError with every fault, its path and the remedy.

    Args:
        environment: variables that name keys, where they are not this process' own.
    """
    try:
        return section.model_validate(
            data, context=None if environment is None else {ENVIRONMENT: environment}
        )
    except ValidationError as error:
        raise ConfigError(explain(error, section)) from error


def load(path: Path) -> ServeFile:
    """The Serve config of the file at `path`. Raises ConfigError."""
    return parse(read(path), path)


def parse(source: ConfigSource, path: Path) -> ServeFile:
    """What `path` was found to hold, checked. Raises ConfigError."""
    try:
        return validate(ServeFile, source.data, source.environment)
    except ConfigError as error:
        faults = "\n".join(f"  {source.locate(fault.strip())}" for fault in str(error).splitlines())
        raise ConfigError(f"{path} has errors:\n{faults}") from error


def to_engine_config(llm: LLMConfig, device: Device, balloon_share: float | None = None) -> EngineConfig:
    """What the engine of one rank needs, for a device that is already decided. Raises ConfigError.

    Args:
        balloon_share: of the host memory available at its start, for a balloon without a size.
    """
    memory = llm.memory.model_dump() | {"device_share": llm.device_share}
    memory["balloon_share"] = memory["balloon_share"] or balloon_share or _MEMORY.balloon_share
    kwargs = llm.engine_kwargs
    return EngineConfig(
        model=ModelSource(
            model_id=llm.model_id,
            source=llm.model_source,
            tokenizer_source=llm.model_loading_config.tokenizer_source,
            load_format=kwargs.load_format,
            dtype=kwargs.dtype,
            seed=kwargs.seed,
        ),
        memory=MemoryConfig(**memory, enable_prefix_caching=kwargs.enable_prefix_caching),
        scheduler=EngineSchedulerConfig(**kwargs.model_dump(include=_SCHEDULER_FIELDS)),
        slo=SloConfig(**llm.slo.model_dump()),
        device=device,
        max_model_len=kwargs.max_model_len,
        num_threads=kwargs.num_threads,
        enforce_eager=kwargs.enforce_eager,
        tensor_parallel_size=kwargs.tensor_parallel_size,
        step_timeout_s=kwargs.step_timeout_s,
    )
