"""From the file that would be deployed, and the options, to what is simulated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cluster.config import LLMConfig, ServeFile, to_engine_config
from cluster.planner.hardware import default_calibration
from cluster.policy import PolicyConfig
from engine.calibration import Calibration
from engine.config import Device, EngineConfig
from engine.errors import ConfigError

if TYPE_CHECKING:
    from engine.simulation import EngineShape  # loads torch

_LARGEST_SHARE = 0.5
_UPSCALE_S, _DOWNSCALE_S, _ONGOING = 30.0, 600.0, 2.0  # Ray Serve's own defaults


@dataclass(frozen=True, slots=True)
class Replicas:
    """How many groups a model has, and how soon that changes.

    Attributes:
        first, least, most: groups; without autoscaling they are one number.
        upscale_s, downscale_s: that a wish has to last.
        ongoing: requests of a group by which Serve scales where no controller speaks.
    """

    first: int
    least: int
    most: int
    upscale_s: float = _UPSCALE_S
    downscale_s: float = _DOWNSCALE_S
    ongoing: float = _ONGOING


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """One model.

    Attributes:
        config: of each rank's engine.
        shape: of the model.
    """

    model_id: str
    config: EngineConfig
    shape: EngineShape
    calibration: Calibration
    replicas: Replicas

    @property
    def num_ranks(self) -> int:
        """Devices of a group."""
        return self.config.tensor_parallel_size

    @property
    def ttft_slo_s(self) -> float:
        return self.config.slo.ttft_ms / 1e3

    @property
    def tpot_slo_s(self) -> float:
        return self.config.slo.tpot_ms / 1e3


@dataclass(frozen=True, slots=True)
class Plan:
    """What is simulated.

    Attributes:
        policy: of the controller; None if it only looks.
        gpus_per_node: that groups are placed on; groups on CPUs share one node.
        host_bytes: memory of each node.
        num_routers: ingress replicas, each with a router of its own.
        assumed: what nobody has said, in words.
    """

    models: tuple[ModelPlan, ...]
    policy: PolicyConfig | None
    tick_s: float
    gpus_per_node: int
    host_bytes: int
    num_routers: int
    seed: int
    assumed: tuple[str, ...] = ()

    def balloon_bytes(self, model: ModelPlan) -> int:
        """Host memory of a rank's balloon until the controller speaks, as an engine takes it at its start."""
        memory = model.config.memory
        if memory.balloon_bytes is not None:
            return memory.balloon_bytes
        if model.config.device == "cpu":
            return 0
        return int(self.host_bytes * memory.balloon_share / model.num_ranks)


def make_plan(
    file: ServeFile,
    *,
    groups: int | None,
    gpu: str | None,
    calibrations: Mapping[str, Calibration],
    load_s: float | None,
    gpus_per_node: int,
    host_bytes: int | None,
    seed: int,
) -> Plan:
    """What the file asks for, with what the options add.

    Raises:
        ConfigError: several applications, or something that a plan needs is not known.
        ModelLoadError: a model's configuration cannot be read.
    """
    if len(file.applications) > 1:
        raise ConfigError(
            "the file has several applications: simulate them one by one, in files of their own"
        )
    args = file.applications[0].args
    assumed = []
    if host_bytes is None:
        host_bytes = args.controller.host_memory_bytes or 512 << 30
        if args.controller.host_memory_bytes is None:
            assumed.append("512 GiB of host memory a node (--host-memory)")
    most = sum(
        _replicas(llm, groups).most * llm.engine_kwargs.tensor_parallel_size for llm in args.llm_configs
    )
    share = min(_LARGEST_SHARE, 1 / max(1, min(most, gpus_per_node)))
    models = tuple(_model_plan(llm, groups, gpu, calibrations, share, load_s) for llm in args.llm_configs)
    if any(model.config.device == "cuda" for model in models):
        assumed.append(f"{gpus_per_node} GPUs a node (--gpus-per-node)")
    return Plan(
        models,
        args.controller.policy(),
        args.controller.tick_s,
        gpus_per_node,
        host_bytes,
        args.ingress.num_replicas,
        seed,
        tuple(assumed),
    )


def _model_plan(
    llm: LLMConfig,
    groups: int | None,
    gpu: str | None,
    calibrations: Mapping[str, Calibration],
    share: float,
    load_s: float | None,
) -> ModelPlan:
    from engine.simulation import read_shape  # loads torch

    name, measured = gpu or llm.accelerator_type, calibrations.get(llm.model_id)
    wanted = llm.engine_kwargs.device
    device: Device = ("cuda" if name or measured is None else "cpu") if wanted == "auto" else wanted
    if device == "cpu" and measured is None:
        raise ConfigError(
            f"{llm.model_id} runs on a CPU, and no two are alike: measure it with `ballonet simulate FILE "
            "--calibrate figures.json`, then give --calibration figures.json"
        )
    config = to_engine_config(llm, device, share)
    shape = read_shape(config)
    calibration = measured or default_calibration(
        name, shape, config.tensor_parallel_size, config.memory.margin_bytes, llm.model_id
    )
    if load_s is not None:
        sources = {**calibration.sources, "load_s": "--load-s"}
        calibration = replace(calibration, load_s=load_s, sources=sources)
    return ModelPlan(llm.model_id, config, shape, calibration, _replicas(llm, groups))


def _replicas(llm: LLMConfig, groups: int | None) -> Replicas:
    """As Ray Serve reads the same section."""
    options = llm.deployment_config
    if groups is not None:
        return Replicas(groups, groups, groups)
    auto = options.autoscaling_config
    if auto is None and options.num_replicas != "auto":
        count = options.num_replicas or 1
        return Replicas(count, count, count)
    least = 1 if auto is None or auto.min_replicas is None else auto.min_replicas
    most = 100 if auto is None else auto.max_replicas or max(1, least)
    first = max(1, least) if auto is None else auto.initial_replicas or max(1, least)
    return Replicas(
        first,
        max(1, least),
        max(most, first),
        _or(auto.upscale_delay_s if auto else None, _UPSCALE_S),
        _or(auto.downscale_delay_s if auto else None, _DOWNSCALE_S),
        _or(auto.target_ongoing_requests if auto else None, _ONGOING),
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
