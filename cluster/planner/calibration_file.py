"""The file of measured figures: `--calibrate` writes it, `--calibration` reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
import yaml
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from cluster.config import validate
from cluster.config_values import Bytes, Section
from engine.calibration import Calibration, DecodePoint, PrefillPoint, StepPoints
from engine.errors import ConfigError


class PrefillRow(Section):
    """A step that computed `tokens` of a prompt behind `context` others."""

    tokens: PositiveInt
    context: NonNegativeInt = 0
    seconds: PositiveFloat


class DecodeRow(Section):
    """A step of `batch` decodes of `context` tokens each."""

    batch: PositiveInt
    context: NonNegativeInt
    seconds: PositiveFloat


class ModelFigures(Section):
    """One model on one device; `engine.calibration` says what the figures mean."""

    source: str = Field(min_length=1)
    device: Literal["cpu", "cuda"]
    prefill: Annotated[tuple[PrefillRow, ...], Field(min_length=1, strict=False)]
    decode: Annotated[tuple[DecodeRow, ...], Field(min_length=1, strict=False)]
    link_bytes_s: PositiveFloat
    pin_s_per_gib: NonNegativeFloat
    load_s: NonNegativeFloat
    pool_bytes: Bytes | None = None


def read_calibrations(path: Path) -> dict[str, Calibration]:
    """By model id. Raises ConfigError, which names the field that is wrong."""
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"--calibration {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--calibration {path} is neither JSON nor YAML: {error}") from error
    models = data.get("models") if isinstance(data, dict) else None
    if not isinstance(models, dict) or not models:
        raise ConfigError(f"--calibration {path}: no figures by model id under `models`")
    return {
        str(model_id): _calibration(path, _figures(path, model_id, one)) for model_id, one in models.items()
    }


def _figures(path: Path, model_id: object, data: object) -> ModelFigures:
    try:
        return validate(ModelFigures, data)
    except ConfigError as error:
        raise ConfigError(f"--calibration {path}, {model_id}, has errors:\n{error}") from error


def _calibration(path: Path, one: ModelFigures) -> Calibration:
    return Calibration(
        StepPoints(
            [PrefillPoint(row.tokens, row.context, row.seconds) for row in one.prefill],
            [DecodePoint(row.batch, row.context, row.seconds) for row in one.decode],
        ),
        one.link_bytes_s,
        one.pin_s_per_gib,
        one.load_s,
        one.pool_bytes,
        one.device,
        {"all": f"{path.name}: {one.source}"},
    )


def write_calibrations(path: Path, models: Mapping[str, Mapping[str, Any]]) -> None:
    """What `engine.measuring` found, by model id."""
    text = orjson.dumps({"models": models}, option=orjson.OPT_INDENT_2).decode()
    for one in yaml.safe_load(text)["models"].values():
        validate(ModelFigures, one)
    path.write_text(text + "\n")
