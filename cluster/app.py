"""The composition root: from `args` to a Ray Serve application.

`import_path: cluster.app:build` in a Serve config file leads here, with `serve deploy` and with
`ballonet serve` alike. Nothing else in the repository constructs deployments.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from cluster.config import LLMConfig, ServingArgs, to_engine_config, validate
from cluster.config_sharing import balloon_share
from cluster.controller import ControllerReplica
from cluster.early_choice import begin_early
from cluster.gpu_needs import device_of
from cluster.group import TpGroup
from cluster.ingress import IngressConfig, create_app
from cluster.metrics import IngressMetrics, RayBackend
from cluster.request_courier import RequestCourier
from cluster.served_model import GroupsOfModel
from cluster.token_inbox import TokenInbox
from cluster.tokenizer import Tokenizer
from engine.actor import EngineActor
from engine.config import Device

_log = logging.getLogger("ray.serve")
# Serve's own processes are light: shares small enough that a laptop with one free core has room.
_LIGHT = 0.1
_CPU_RANK = {"CPU": 0.5}
_GPU_RANK = {"CPU": 1.0, "GPU": 1.0}
_STATS_PERIOD_S = 0.5
_BURST = 64
_HEALTH_PERIOD_S = 2.0  # how soon an ingress or the controller is missed; Serve's 10 s leave clients waiting
_CONTROL_CALLS = 64  # health checks and snapshots that an engine answers beside its requests


@dataclass(frozen=True, slots=True)
class _Served:
    """What an ingress replica needs to know of one model. Travels to it pickled."""

    model_id: str
    deployment: str
    tokenizer_source: str
    created: int


def build(args: dict[str, Any]) -> serve.Application:
    """The application that `args` describe. Ray must be running. Raises ConfigError."""
    return build_application(validate(ServingArgs, args), EngineActor)


def build_application(args: ServingArgs, engine_class: type) -> serve.Application:
    """The same with an engine of choice: a plain class shaped like `engine.actor.EngineActor`."""
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    created = int(time.time())
    served, groups = [], {}
    share = _balloon_share(args)
    for llm in args.llm_configs:
        name = deployment_name(llm.model_id)
        served.append(_Served(llm.model_id, name, llm.tokenizer_source, created))
        device = device_of(llm, args, has_gpus)
        if device == "cuda" and not has_gpus:
            _log.warning("%s is for GPUs, and the cluster has none yet: it waits for them", llm.model_id)
        groups[llm.model_id] = _group(name, llm, device, share, engine_class)
    controller = serve.deployment(ControllerReplica).options(
        name="Controller",
        num_replicas=1,
        health_check_period_s=_HEALTH_PERIOD_S,
        ray_actor_options={"num_cpus": _LIGHT},
    )
    ingress = serve.deployment(serve.ingress(_asgi_builder(tuple(served), args))()).options(
        name="Ingress",
        num_replicas=args.ingress.num_replicas,
        max_ongoing_requests=args.ingress.max_ongoing_requests,
        # An ingress that leaves has as long as the groups behind it.
        graceful_shutdown_timeout_s=max(
            llm.deployment_config.graceful_shutdown_timeout_s for llm in args.llm_configs
        ),
        health_check_period_s=_HEALTH_PERIOD_S,
        ray_actor_options={"num_cpus": _LIGHT},
    )
    # Serve takes from these arguments only which deployments belong together; the ingress resolves
    # its handles by name.
    return ingress.bind(
        *groups.values(), controller.bind(groups, args.controller.tick_s, args.controller.policy())
    )


def deployment_name(model_id: str) -> str:
    """The Serve deployment of a model's groups; Serve reserves some characters."""
    return f"TpGroup-{re.sub(r'[^A-Za-z0-9_.-]', '-', model_id)}"


def _balloon_share(args: ServingArgs) -> float:
    gpus = max((node["Resources"].get("GPU", 0) for node in ray.nodes()), default=0)
    most = sum(llm.most_ranks for llm in args.llm_configs)
    return balloon_share(most, gpus, min(llm.device_share for llm in args.llm_configs))


def _group(
    name: str, llm: LLMConfig, device: Device, balloon_share: float, engine_class: type
) -> serve.Application:
    resources = _rank_resources(llm, device)
    options = llm.deployment_config
    # The engine alone knows what it can take. Serve counts a request as queued while it looks for a
    # replica, so limits near the engine's own would refuse bursts that the engine has room for.
    room = 2 * (llm.engine_kwargs.max_num_seqs + llm.engine_kwargs.max_num_queued_reqs) + _BURST
    max_ongoing = options.max_ongoing_requests or room
    chosen = options.model_dump(exclude_none=True, exclude={"max_ongoing_requests", "max_queued_requests"})
    if options.autoscaling_config is not None:
        chosen["autoscaling_config"]["policy"] = {"policy_function": "cluster.scaling:wanted_replicas"}
    deployment = serve.deployment(TpGroup).options(
        name=name,
        **chosen,
        max_ongoing_requests=max_ongoing,
        max_queued_requests=options.max_queued_requests or room,
        ray_actor_options={"num_cpus": _LIGHT},
        placement_group_bundles=[{"CPU": _LIGHT}, *[resources] * llm.engine_kwargs.tensor_parallel_size],
        placement_group_strategy=llm.placement_group_config.strategy
        if llm.placement_group_config
        else "STRICT_PACK",
        request_router_config=RequestRouterConfig(
            request_router_class="cluster.router:SloRouter",
            request_routing_stats_period_s=_STATS_PERIOD_S,
        ),
        logging_config={"enable_access_log": False},
    )
    return deployment.bind(
        to_engine_config(llm, device, balloon_share), engine_class, resources, max_ongoing + _CONTROL_CALLS
    )


def _rank_resources(llm: LLMConfig, device: Device) -> dict[str, float]:
    resources = dict(_GPU_RANK | {"GPU": llm.device_share} if device == "cuda" else _CPU_RANK)
    if llm.placement_group_config is not None:
        resources = dict(llm.placement_group_config.bundle_per_worker)
    if llm.accelerator_type is not None:
        resources[f"accelerator_type:{llm.accelerator_type}"] = 0.001  # Ray's way to ask for a kind of GPU
    return resources


def _asgi_builder(served: tuple[_Served, ...], args: ServingArgs) -> Callable[[], FastAPI]:
    """A function that Serve calls in each ingress replica."""
    config = IngressConfig(
        api_keys=args.ingress.all_api_keys(),
        admin_api_keys=args.ingress.all_admin_api_keys(),
        salts_by_api_key=args.ingress.prefix_cache_salt == "api_key",
        max_body_bytes=args.ingress.max_body_bytes,
        request_timeout_s=args.ingress.request_timeout_s,
    )

    def build_asgi_app() -> FastAPI:
        inbox, courier = TokenInbox(ray.util.get_node_ip_address()), RequestCourier()
        models = {}
        for model in served:
            handle: DeploymentHandle[Any] = serve.get_deployment_handle(model.deployment)
            models[model.model_id] = GroupsOfModel(
                model.model_id,
                model.created,
                Tokenizer.load(model.tokenizer_source),
                handle,
                inbox,
                courier,
                partial(begin_early, handle.app_name, handle.deployment_name),
            )
        return create_app(models, config, IngressMetrics(RayBackend()))

    return build_asgi_app
