"""Values of the configuration file that YAML has no type for: sizes, paths, and what a section is."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

DEFAULT_MAX_BODY_BYTES = 4 << 20  # a context of 128k tokens is about half a MiB of text

_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_bytes(value: object) -> int:
    """`1GiB`, `512 MiB`, `2GB` (decimal) or a number of bytes. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _BYTES.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{value!r} is no size; write bytes, or a number with KiB, MiB, GiB or TiB")
    number, power, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWERS[power.lower()])


def expand(value: str) -> str:
    """`~` and `$VARIABLES` replaced; a variable that is not set raises ValueError."""
    expanded = os.path.expandvars(os.path.expanduser(value))
    if missing := re.search(r"\$\{?(\w+)\}?", expanded):
        raise ValueError(f"the environment variable {missing[1]} is not set")
    return expanded


def _source(value: object) -> object:
    """A path becomes absolute, because replicas run in another directory; a hub id stays."""
    if not isinstance(value, str):
        return value
    expanded = expand(value)
    is_path = expanded.startswith((".", "/")) or Path(expanded).exists()
    return str(Path(expanded).absolute()) if is_path else expanded


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
Source = Annotated[str, BeforeValidator(_source), Field(min_length=1)]


class Section(BaseModel):
    """Base of every part of the file: unknown keys are errors, values never change."""

    # strict: YAML has types, and `num_replicas: "2"` or `max_num_seqs: true` is a slip of the pen.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())
