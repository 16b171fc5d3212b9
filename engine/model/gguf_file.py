"""Reading a GGUF file: its metadata, its tensor table, and one tensor at a time, dequantised.

The `gguf` package dequantises; its reader is not used, because it turns every vocabulary entry into
Python objects (3 s for 50,000 tokens) where this one steps over them (0.1 s). The file is not trusted:
every length is checked against what is left of it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from engine.errors import ModelLoadError

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One row of the tensor table.

    Attributes:
        shape: outermost dimension first, as torch counts them.
        quantization: the ggml type of the data.
        offset: bytes from the start of the file.
    """

    shape: tuple[int, ...]
    quantization: GGMLQuantizationType
    offset: int
    num_bytes: int


class GgufFile:
    """The header of a GGUF file and access to its tensors.

    Attributes:
        metadata: scalar and string values by key; of an array only its length.
        tensors: the tensor table by GGUF name.

    Raises:
        ModelLoadError: the file is missing, cut short or not GGUF version 2 or 3.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # As a plain array: every slice of a memmap object costs a microsecond more.
            self._data = np.memmap(path, mode="r").view(np.ndarray)
            self.metadata, self.tensors = _Header(self._data).read()
        except OSError as error:
            raise ModelLoadError(f"cannot read {path}: {error.strerror or error}") from error
        except (ValueError, struct.error, UnicodeDecodeError) as error:
            raise ModelLoadError(f"{path} is not a readable GGUF file: {error}; fetch it again") from error

    def read(self, name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """A tensor in float32, in its own shape."""
        entry = self.tensors[name]
        block_size, type_bytes = GGML_QUANT_SIZES[entry.quantization]
        raw = self._data[entry.offset : entry.offset + entry.num_bytes]
        try:
            if entry.quantization in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
                plain = "<f4" if entry.quantization == GGMLQuantizationType.F32 else "<f2"
                return raw.view(plain).astype(np.float32).reshape(entry.shape)
            row_bytes = entry.shape[-1] // block_size * type_bytes
            flat = dequantize(raw.reshape(-1, row_bytes), entry.quantization)
        except NotImplementedError as error:
            raise ModelLoadError(
                f"tensor {name} of {self.path} is quantised as {entry.quantization.name}, which cannot be "
                "read; use a file of type Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, a K quantisation, F16, BF16 or F32"
            ) from error
        values: np.ndarray[Any, np.dtype[np.float32]] = flat.astype(np.float32, copy=False)
        return values.reshape(entry.shape)


class _Header:
    """A cursor over the header's bytes."""

    def __init__(self, data: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        self._data: memoryview = data.data
        self._size = len(data)
        self._at = 0

    def read(self) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
        if bytes(self._data[:4]) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not known")
        num_tensors, num_keys = self._scalar("Q"), self._scalar("Q")
        metadata = {}
        for _ in range(num_keys):
            key = self._string()
            metadata[key] = self._value(self._scalar("I"))
        table = [self._tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"alignment {alignment!r}")
        base = -(-self._at // alignment) * alignment
        return metadata, dict(self._place(*row, base) for row in table)

    def _take(self, num_bytes: int) -> int:
        start = self._at
        if num_bytes > self._size - start:
            raise ValueError(f"it ends at byte {self._size}, inside its header")
        self._at += num_bytes
        return start

    def _scalar(self, code: str) -> Any:
        layout = "<" + code
        return struct.unpack_from(layout, self._data, self._take(struct.calcsize(layout)))[0]

    def _string(self) -> str:
        length = self._scalar("Q")
        start = self._take(length)
        return bytes(self._data[start : start + length]).decode()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._skip_array()
        if kind not in _SCALARS:
            raise ValueError(f"value type {kind} is not known")
        return self._scalar(_SCALARS[kind])

    def _skip_array(self) -> int:
        kind, length = self._scalar("I"), self._scalar("Q")
        if kind in _SCALARS:
            self._take(length * struct.calcsize("<" + _SCALARS[kind]))
            return int(length)
        # Strings are all a vocabulary has; arrays in arrays occur in no file that llama.cpp writes.
        if kind != _STRING:
            raise ValueError(f"array of value type {kind}")
        unpack: Callable[..., tuple[int]] = struct.Struct("<Q").unpack_from
        for _ in range(length):
            self._take(unpack(self._data, self._take(8))[0])
        return int(length)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_dimensions = self._scalar("I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name} has {num_dimensions} dimensions")
        shape = tuple(self._scalar("Q") for _ in range(num_dimensions))[::-1]
        return name, shape, self._scalar("I"), self._scalar("Q")

    def _place(
        self, name: str, shape: tuple[int, ...], kind: int, offset: int, base: int
    ) -> tuple[str, TensorEntry]:
        quantization = GGMLQuantizationType(kind)
        block_size, type_bytes = GGML_QUANT_SIZES[quantization]
        num_elements = 1
        for length in shape:
            num_elements *= length
        if shape[-1] % block_size:
            raise ValueError(f"tensor {name}: rows of {shape[-1]} are no whole {quantization.name} blocks")
        num_bytes = num_elements // block_size * type_bytes
        if base + offset + num_bytes > self._size:
            raise ValueError(f"tensor {name} lies past the end of the file: the download was cut short")
        return name, TensorEntry(shape, quantization, base + offset, num_bytes)
