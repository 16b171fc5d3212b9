"""A RayService manifest of KubeRay, as far as it has to agree with the Serve config that it holds.

The API server checks the rest, and knows all fields; here a field that is missing or of another shape than it
should be is one that is not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_GPU = "nvidia.com/gpu"
DEFAULT_DELETION_DELAY_S = 60  # KubeRay's


class PodGroup:
    """The head group, or a worker group.

    Args:
        path: of the group in the manifest.
        section: the group's own.
    """

    def __init__(self, path: str, section: Mapping[str, Any]) -> None:
        self.path = path
        self._section = section
        # KubeRay starts Ray in the first container of a pod.
        first = _items(_at(section, "template", "spec"), "containers")[:1]
        self._container = first[0] if first else {}

    @property
    def image(self) -> str:
        return str(self._container.get("image", ""))

    @property
    def environment(self) -> dict[str, Any]:
        """Variables by name: a value, or None for one from a Secret or another source."""
        return {str(one.get("name")): one.get("value") for one in _items(self._container, "env")}

    @property
    def environment_sources(self) -> dict[str, Any]:
        """All that is declared of each variable, and the sources of many at once."""
        found: dict[str, Any] = {str(one.get("name")): one for one in _items(self._container, "env")}
        if sources := _items(self._container, "envFrom"):
            found["envFrom"] = sources
        return found

    @property
    def serve_port(self) -> int | None:
        """The port that is called `serve`, by which KubeRay finds it."""
        ports = {one.get("name"): one.get("containerPort") for one in _items(self._container, "ports")}
        return ports.get("serve")

    @property
    def gpus(self) -> float:
        """GPUs of each pod, as Ray counts them."""
        started = _at(self._section, "rayStartParams").get("num-gpus")
        return _number(started, _number(_at(self._container, "resources", "limits").get(_GPU), 0.0))

    def num_pods(self, autoscales: bool) -> int:
        """Pods that there may be: what is asked for, or with Ray's autoscaler what it may ask for."""
        name, default = (
            ("maxReplicas", 0) if autoscales else ("replicas", self._section.get("minReplicas", 0))
        )
        pods = _number(self._section.get(name), _number(default, 0.0))
        return int(pods * _number(self._section.get("numOfHosts"), 1.0))


class RayService:
    """The manifest.

    Args:
        document: as YAML has it.
    """

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._spec = _at(document, "spec")
        self._cluster = _at(self._spec, "rayClusterConfig")
        self.head = PodGroup("spec.rayClusterConfig.headGroupSpec", _at(self._cluster, "headGroupSpec"))
        self.workers = [
            PodGroup(f"spec.rayClusterConfig.workerGroupSpecs[{number}]", section)
            for number, section in enumerate(_items(self._cluster, "workerGroupSpecs"))
        ]

    @property
    def serve_config(self) -> Any:
        return self._spec.get("serveConfigV2")

    @property
    def ray_version(self) -> Any:
        return self._cluster.get("rayVersion")

    @property
    def deletion_delay_s(self) -> float:
        """How long the cluster before an upgrade stays."""
        return _number(self._spec.get("rayClusterDeletionDelaySeconds"), DEFAULT_DELETION_DELAY_S)

    def node_gpus(self) -> list[float]:
        """GPUs of each pod that there may be."""
        autoscales = self._cluster.get("enableInTreeAutoscaling") is True
        workers = [group.gpus for group in self.workers for _ in range(group.num_pods(autoscales))]
        return [self.head.gpus, *workers]


def _at(section: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    for key in keys:
        below = section.get(key)
        section = below if isinstance(below, dict) else {}
    return section


def _items(section: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    found = section.get(key)
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _number(value: Any, default: float) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return default
