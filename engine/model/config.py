"""Where a model comes from, and the architecture its configuration describes.

Finds and opens configurations only (config.json, or GGUF metadata), never weights. What the fields mean is
said in `hf_config.py` and `gguf_config.py`.
"""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Any

from engine.config import ModelSource
from engine.errors import ModelLoadError
from engine.model.architecture import ModelConfig, RopeConfig
from engine.model.gguf_config import gguf_config
from engine.model.gguf_file import GgufFile
from engine.model.hf_config import hf_config

__all__ = ["ModelConfig", "RopeConfig", "SourceKind", "load_model_config", "source_kind"]


_CONFIG = "config.json"
_GENERATION = "generation_config.json"


class SourceKind(Enum):
    """What a `ModelSource.source` turned out to be."""

    DIRECTORY = "directory"
    GGUF = "gguf"
    HUB = "hub"


def source_kind(source: ModelSource) -> SourceKind:
    """Tell a directory, a `.gguf` file and a hub id apart, and check that the first two exist.

    Raises:
        ModelLoadError: nothing is there, or `load_format` asks for something else than what is there.
    """
    path = Path(source.source).expanduser()
    wants_gguf, wants_safetensors = source.load_format == "gguf", source.load_format == "safetensors"
    if source.source.endswith(".gguf"):
        if not path.is_file():
            raise ModelLoadError(f"there is no file {path}; check the path, or download the model first")
        if wants_safetensors:
            raise ModelLoadError(f"load_format is safetensors but {path} is a GGUF file; use gguf or auto")
        return SourceKind.GGUF
    if path.is_file():
        raise ModelLoadError(
            f"{path} is a file but not a .gguf file; give a directory, a GGUF file or a hub id"
        )
    if wants_gguf:
        raise ModelLoadError(f"load_format is gguf, so the source must end in .gguf, not {source.source!r}")
    if path.is_dir():
        return SourceKind.DIRECTORY
    if source.source.startswith(("/", ".", "~")) or source.source.count("/") != 1:
        raise ModelLoadError(
            f"there is no directory {path}; give a directory, a .gguf file or a hub id such as "
            "Qwen/Qwen3-0.6B"
        )
    return SourceKind.HUB


def load_model_config(source: ModelSource) -> ModelConfig:
    """Read the configuration of a model. Only a hub id may use the network.

    Raises:
        ModelLoadError: nothing readable is there, or the model is not supported.
    """
    kind = source_kind(source)
    path = Path(source.source).expanduser()
    if kind is SourceKind.GGUF:
        return gguf_config(GgufFile(path))
    where = str(path) if kind is SourceKind.DIRECTORY else source.source
    config, generation = _directory_files(path) if kind is SourceKind.DIRECTORY else _hub_files(where)
    # Chat models often name the end of a turn only in generation_config.json, which is optional.
    return hf_config(_read_json(config), where, _read_json(generation) if generation else {})


def _directory_files(directory: Path) -> tuple[Path, Path | None]:
    config, generation = directory / _CONFIG, directory / _GENERATION
    if not config.is_file():
        raise ModelLoadError(
            f"{directory} has no config.json: it is not a model directory (a GGUF file is given by its own "
            "path)"
        )
    return config, generation if generation.is_file() else None


def _hub_files(hub_id: str) -> tuple[Path, Path | None]:
    """Both files, downloaded if they are not in the cache as the hub has them now."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RemoteEntryNotFoundError

    # What a broken connection raises: httpx's error in huggingface_hub 1, httpx2's in 2.
    connection_error: type[Exception] = HfHubHTTPError.__bases__[0]

    try:
        config = Path(hf_hub_download(hub_id, _CONFIG))
        try:
            return config, Path(hf_hub_download(hub_id, _GENERATION))
        except EntryNotFoundError:  # neither the hub has it nor, without a network, the cache
            return config, None
    except RemoteEntryNotFoundError as error:
        raise ModelLoadError(
            f"{hub_id} has no config.json: it is not a model in Hugging Face's form (a GGUF file is "
            "downloaded first and given by its path)"
        ) from error
    except (OSError, ValueError, connection_error) as error:
        raise ModelLoadError(
            f"cannot read the configuration of {hub_id}: {error}; check the id, the network and, for a gated "
            "model, HF_TOKEN"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(
            f"cannot read the configuration of {path.parent}: {path.name}: {error}; check the file"
        ) from error
    if not isinstance(content, dict):
        raise ModelLoadError(
            f"cannot read the configuration of {path.parent}: {path.name} is not a JSON object; check the "
            "file"
        )
    return content
