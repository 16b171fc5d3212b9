"""Where a file's Serve config stands: it is the file itself, or a RayService of KubeRay holds it as text."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from cluster.ray_service import RayService
from engine.errors import ConfigError

INSIDE = "spec.serveConfigV2"


@dataclass(frozen=True, slots=True)
class ConfigSource:
    """What a file holds.

    Attributes:
        data: the Serve config, not checked yet.
        place: of the Serve config in the file; empty if it is the file.
        service: the RayService around it, if there is one.
        environment: variables of the processes that will read the config.
    """

    data: object
    place: str = ""
    service: RayService | None = None
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def locate(self, fault: str) -> str:
        """A fault of the Serve config, with its place in the file."""
        if not self.place:
            return fault
        whole = fault.removeprefix("the file")
        return f"{self.place}{whole}" if whole != fault else f"{self.place}.{fault}"


def read(path: Path) -> ConfigSource:
    """The Serve config of the file at `path`. Raises ConfigError."""
    try:
        documents = [document for document in yaml.safe_load_all(path.read_text()) if document is not None]
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    services = [one for one in documents if isinstance(one, dict) and one.get("kind") == "RayService"]
    if len(services) == 1:
        return _inside(RayService(services[0]), path)
    if len(documents) > 1:
        raise ConfigError(
            f"{path} holds {len(documents)} YAML documents, {len(services)} of them a RayService; a file is "
            "one Serve config, or one RayService and what belongs to it"
        )
    return ConfigSource(documents[0] if documents else None)


def _inside(service: RayService, path: Path) -> ConfigSource:
    text = service.serve_config
    if not isinstance(text, str):
        raise ConfigError(
            f"{path} has errors:\n  {INSIDE}: must be a Serve config as text: `serveConfigV2: |`"
        )
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} has errors:\n  {INSIDE}: is not YAML: {error}") from error
    # Secrets are not in the file: that a variable is declared is all there is to know.
    declared = {name: value or "declared" for name, value in service.head.environment.items()}
    return ConfigSource(data, INSIDE, service, {**os.environ, **declared})
