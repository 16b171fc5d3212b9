"""What of a RayService does not fit the Serve config inside it, or the Ray that is installed here."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

from cluster import config, config_source
from cluster.config import ServeFile
from cluster.gpu_needs import says_cuda, shortage
from cluster.ray_service import PodGroup, RayService
from engine.errors import ConfigError

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_KUBERAY_PORT = 8000  # what it probes where no port is called serve
_CLUSTER = "spec.rayClusterConfig"


def check(path: Path) -> tuple[ServeFile, list[str]]:
    """The file at `path`, and what is no fault of it but worth knowing. Raises ConfigError."""
    source = config_source.read(path)
    file = config.parse(source, path)
    if source.service is None:
        return file, []
    if faults := list(_faults(source.service, file)):
        raise ConfigError(f"{path} has errors:\n" + "\n".join(f"  {fault}" for fault in faults))
    return file, list(_notes(source.service, file))


def _faults(service: RayService, file: ServeFile) -> Iterator[str]:
    installed = importlib.metadata.version("ray")
    if service.ray_version != installed:
        yield (
            f"{_CLUSTER}.rayVersion: is {service.ray_version!r}, and the Ray here is {installed}; KubeRay "
            f"goes by it: write '{installed}', or check with the Ballonet of the image"
        )
    yield from _port_faults(service, file)
    for group in service.workers:
        yield from _differences(service.head, group)
    if lack := shortage(file, service.node_gpus()):
        yield f"{_CLUSTER}.workerGroupSpecs: {lack}"
    if any(service.node_gpus()):
        yield from _device_faults(file)


def _port_faults(service: RayService, file: ServeFile) -> Iterator[str]:
    http = file.http_options
    if "host" in http.model_fields_set and http.host in _LOOPBACK:
        where = f"{config_source.INSIDE}.http_options.host"
        yield f"{where}: {http.host} is open to the pod alone; write 0.0.0.0"
    if service.head.serve_port is None:
        yield f"{service.head.path}: its first container names no port serve, which the Service leads to"
    for group in (service.head, *service.workers):
        port = group.serve_port or _KUBERAY_PORT
        if port != http.port:
            yield (
                f"{group.path}: its port serve is {port}, and {config_source.INSIDE}.http_options.port "
                f"{http.port}: KubeRay's Service and probes ask the former"
            )


def _differences(head: PodGroup, group: PodGroup) -> Iterator[str]:
    """Any node may build the application, and run ingresses: all need what it reads."""
    if group.image != head.image:
        yield f"{group.path}: runs the image {group.image!r}, and the head {head.image!r}"
    here, there = group.environment_sources, head.environment_sources
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            how = "is missing here" if name not in here else "is missing in the head group"
            how = "differs from the head group's" if name in here and name in there else how
            yield f"{group.path}: the environment's {name} {how}; both have to be alike"


def _device_faults(file: ServeFile) -> Iterator[str]:
    for number, application in enumerate(file.applications):
        models = application.args.llm_configs
        for index, llm in enumerate(models):
            if llm.engine_kwargs.device == "auto" and not any(map(says_cuda, models)):
                where = f"{config_source.INSIDE}.applications[{number}].args.llm_configs[{index}]"
                yield (
                    f"{where}.engine_kwargs.device: auto would be the CPU, as Ray builds the application "
                    "before nodes with GPUs have joined; write cuda or cpu"
                )


def _notes(service: RayService, file: ServeFile) -> Iterator[str]:
    longest = max(
        llm.deployment_config.graceful_shutdown_timeout_s
        for application in file.applications
        for llm in application.args.llm_configs
    )
    if service.deletion_delay_s < longest:
        yield (
            f"spec.rayClusterDeletionDelaySeconds is {service.deletion_delay_s:g}: an upgrade cuts off what "
            f"still runs then, though graceful_shutdown_timeout_s gives them {longest:g}"
        )
