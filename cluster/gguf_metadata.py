"""Reads the metadata of a GGUF file: names and values, no tensors.

The gguf package's reader makes an array of every string, which takes seconds for a vocabulary; this one
takes a tenth. Format: magic, version, two counts, then (name, type, value) in little-endian order.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from engine.errors import ModelLoadError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)


def read_metadata(path: Path, prefix: str = "") -> dict[str, Any]:
    """The values whose name begins with `prefix`, by the rest of their name.

    Raises:
        ModelLoadError: not a GGUF file, of an unknown version, or cut short.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(data).metadata(prefix)
    except (OSError, ValueError, struct.error) as error:
        raise ModelLoadError(f"{path} is not a readable GGUF file: {error}") from error


class _Cursor:
    """A position in a file."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def metadata(self, prefix: str) -> dict[str, Any]:
        magic, version = self._unpack("4sI")
        if magic != b"GGUF" or version not in _VERSIONS:
            raise ValueError(f"it begins with {magic!r}, version {version}")
        _, num_values = self._unpack("QQ")
        values = {}
        for _ in range(num_values):
            name = self._string()
            value = self._value(*self._unpack("I"))
            if name.startswith(prefix):
                values[name[len(prefix) :]] = value
        return values

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item_kind, count = self._unpack("IQ")
            if item_kind in _SCALARS:
                return list(self._unpack(f"{count}{_SCALARS[item_kind]}"))
            return [self._value(item_kind) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"value type {kind} at byte {self._at}")
        return self._unpack(_SCALARS[kind])[0]

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        start = self._at
        self._at = start + length
        if self._at > len(self._data):
            raise ValueError("it ends within a string")
        return self._data[start : self._at].decode(errors="replace")

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        layout = "<" + layout
        values = struct.unpack_from(layout, self._data, self._at)
        self._at += struct.calcsize(layout)
        return values
