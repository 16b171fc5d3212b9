"""From the file that would be deployed, and the options, to what is simulated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cluster.config import LLMConfig, ServeFile, ServingArgs, to_engine_config
from cluster.config_sharing import balloon_share
from cluster.gpu_needs import device_of
from cluster.planner.hardware import GIB, default_calibration
from cluster.policy import PolicyConfig
from engine.calibration import Calibration
from engine.config import Device, EngineConfig
from engine.errors import ConfigError

if TYPE_CHECKING:
    from engine.simulation import EngineShape  # loads torch

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
        not_simulated: what the file asks for, or what serving takes, that a run leaves out; in words.
    """

    models: tuple[ModelPlan, ...]
    policy: PolicyConfig | None
    tick_s: float
    gpus_per_node: int
    host_bytes: int
    num_routers: int
    seed: int
    assumed: tuple[str, ...] = ()
    not_simulated: tuple[str, ...] = ()

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
        host_bytes, told = _host_bytes(args)
        assumed.append(told)
    most = sum(
        _replicas(llm, groups).most * llm.engine_kwargs.tensor_parallel_size for llm in args.llm_configs
    )
    share = balloon_share(most, gpus_per_node, min(llm.device_share for llm in args.llm_configs))
    if calibrations and not any(llm.model_id in calibrations for llm in args.llm_configs):
        raise ConfigError(
            f"--calibration has figures of {', '.join(calibrations)}, and the file has "
            f"{', '.join(llm.model_id for llm in args.llm_configs)}"
        )
    devices = {llm.model_id: device_of(llm, args, gpu is not None) for llm in args.llm_configs}
    models = tuple(
        _model_plan(llm, devices[llm.model_id], groups, gpu, calibrations.get(llm.model_id), share, load_s)
        for llm in args.llm_configs
    )
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
        tuple(_not_simulated(models)),
    )


def _host_bytes(args: ServingArgs) -> tuple[int, str]:
    """Memory of a node if nobody has said, and how that is told."""
    budget = args.controller.host_memory_bytes
    if budget is None:
        return 512 << 30, "512 GiB of host memory a node (--host-memory)"
    # Engines make no slab beyond seven eighths of what a node has.
    return budget * 8 // 7, (
        f"{budget * 8 / 7 / GIB:.1f} GiB of host memory a node, seven eighths of it for balloons, as "
        "controller.host_memory_bytes says (--host-memory)"
    )


def _not_simulated(models: Sequence[ModelPlan]) -> Iterator[str]:
    yield "HTTP, tokenizing and the way of tokens to clients: some ms of every first token"
    if any(model.replicas.most > 1 for model in models):
        yield "migration: a request that waits in host memory stays there, even if another copy has time"
    if any(model.config.device == "cpu" and model.config.memory.device_share < 1 for model in models):
        yield "memory.device_share on a CPU: each pool keeps its own part"


def _model_plan(
    llm: LLMConfig,
    device: Device,
    groups: int | None,
    gpu: str | None,
    measured: Calibration | None,
    share: float,
    load_s: float | None,
) -> ModelPlan:
    from engine.simulation import read_shape  # loads torch

    if measured is not None and llm.engine_kwargs.device == "auto":
        device = measured.device
    if measured is not None and measured.device != device:
        raise ConfigError(
            f"{llm.model_id} is for {device}, and its figures in --calibration were measured on "
            f"{measured.device}: measure it on such a device, or set engine_kwargs.device"
        )
    if device == "cpu" and measured is None:
        raise ConfigError(
            f"{llm.model_id} runs on a CPU, and no two are alike: measure it with `ballonet simulate FILE "
            "--calibrate figures.json`, then give --calibration figures.json"
        )
    config = to_engine_config(llm, device, share)
    shape = read_shape(config)
    calibration = measured or default_calibration(
        gpu or llm.accelerator_type, shape, config.tensor_parallel_size, config.memory, llm.model_id
    )
    if config.memory.pool_bytes is not None:
        sources = {**calibration.sources, "pool_bytes": "memory.pool_bytes"}
        calibration = replace(calibration, sources=sources)
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
