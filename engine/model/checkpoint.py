"""Where weights come from: safetensors, a GGUF file, or a random generator.

All three answer to the names Hugging Face gives tensors and fill memory that the caller allocated.
Files are not trusted: nothing here unpickles, and what is read has to have the shape that was asked for.
"""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from engine.config import ModelSource
from engine.errors import ModelLoadError
from engine.model.architecture import ModelConfig
from engine.model.config import SourceKind, source_kind
from engine.model.gguf_file import GgufFile
from engine.model.shard import Span

_INDEX = "model.safetensors.index.json"
_DUMMY_STD = 0.02


class Checkpoint(Protocol):
    """A source of tensors."""

    def fill(self, name: str, out: torch.Tensor, span: Span | None = None, dim: int = 0) -> None:
        """Write the tensor `name` into `out`, converting its type.

        Args:
            span: the part of the tensor, along `dim`, that `out` is to have; None is all of it.

        Raises:
            ModelLoadError: there is none, or its shape is another.
        """
        ...

    def close(self) -> None:
        """Let go of the files.

        Raises:
            ModelLoadError: tensors are left that the architecture has no place for.
        """
        ...


def open_checkpoint(source: ModelSource, config: ModelConfig, device: torch.device) -> Checkpoint:
    """The checkpoint a source names; a hub id is downloaded first.

    Raises:
        ModelLoadError: there are no weights in a form that can be read.
    """
    if source.load_format == "dummy":
        return DummyCheckpoint(source.seed, device)
    kind = source_kind(source)
    path = Path(source.source).expanduser()
    if kind is SourceKind.GGUF:
        return GgufCheckpoint(GgufFile(path), config)
    if kind is SourceKind.HUB:
        path = _download(source.source)
    return SafetensorsCheckpoint(path, config)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.safetensors", _INDEX]))
    except (OSError, ValueError) as error:
        raise ModelLoadError(
            f"cannot download the weights of {hub_id}: {error}; check the network, the free disk space and, "
            "for a gated model, HF_TOKEN"
        ) from error


class DummyCheckpoint:
    """Random weights that bfloat16 holds, the same for the same seed and device; norms are one."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)

    def fill(self, name: str, out: torch.Tensor, span: Span | None = None, dim: int = 0) -> None:
        if name.endswith("norm.weight"):
            out.fill_(1.0)
            return
        # A part is drawn as a part of the whole, so that the ranks of a group have one model.
        # In one type, whatever the model's: half precision can be compared with float32 of the same weights.
        shape = out.shape if span is None else _whole_shape(out, span, dim)
        whole = torch.empty(shape, dtype=torch.bfloat16, device=out.device)
        whole.normal_(0.0, _DUMMY_STD, generator=self._generator)
        if span is None:
            out.copy_(whole)
        else:
            _put(whole.narrow(dim, min(span.begin, span.whole), span.count), out, span, dim)

    def close(self) -> None:
        """Nothing is held."""


class SafetensorsCheckpoint:
    """The `.safetensors` files of a directory, memory-mapped."""

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        from safetensors import SafetensorError, safe_open

        self._directory = directory
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._is_tied = config.tie_word_embeddings
        for path in _safetensors_files(directory):
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise ModelLoadError(
                    f"cannot read {path}: {error}; it is damaged or cut short, fetch it again"
                ) from error
            self._files.update(dict.fromkeys(file.keys(), file))
        self._left = set(self._files)

    def fill(self, name: str, out: torch.Tensor, span: Span | None = None, dim: int = 0) -> None:
        if name not in self._files:
            raise ModelLoadError(f"tensor {name} is missing from {self._directory}")
        stored = self._files[name].get_slice(name)  # only what is asked for is read
        shape = out.shape if span is None else _whole_shape(out, span, dim)
        _check_shape(name, tuple(stored.get_shape()), tuple(shape), self._directory)
        tensor = stored[_part(span, dim)]
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise ModelLoadError(f"tensor {name} of {self._directory} is {tensor.dtype}, a quantised type")
        _put(tensor, out, span, dim)
        self._left.discard(name)

    def close(self) -> None:
        self._files.clear()
        self._stack.close()
        # Tied models are often saved with their head all the same; old Llamas with rope frequencies.
        surplus = {name for name in self._left if not name.endswith("rotary_emb.inv_freq")}
        if self._is_tied:
            surplus.discard("lm_head.weight")
        _refuse_surplus(surplus, self._directory)


def _safetensors_files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if not index.is_file():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise ModelLoadError(
                f"{directory} has no .safetensors files; pickled weights (.bin, .pt) are not read: "
                "convert them"
            )
        return files
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelLoadError(f"{index} is not a safetensors index: {error!r}") from error
    for name in names:
        # The index is not trusted to point outside of its directory.
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelLoadError(f"{index} names {name!r}, which is not a file beside it")
        if not (directory / name).is_file():
            raise ModelLoadError(f"{directory / name} is missing; the download is incomplete")
    return [directory / name for name in sorted(names)]


_GGUF_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


class GgufCheckpoint:
    """The tensors of a GGUF file, dequantised one at a time."""

    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        self._file = file
        self._config = config
        self._is_interleaved = file.metadata.get("general.architecture") == "llama"
        self._left = set(file.tensors) - {"rope_freqs.weight"}

    def fill(self, name: str, out: torch.Tensor, span: Span | None = None, dim: int = 0) -> None:
        stored = _gguf_name(name)
        if stored not in self._file.tensors:
            raise ModelLoadError(f"tensor {stored} ({name}) is missing from {self._file.path}")
        shape = out.shape if span is None else _whole_shape(out, span, dim)
        _check_shape(name, self._file.tensors[stored].shape, tuple(shape), self._file.path)
        values = self._file.read(stored)
        if self._is_interleaved and ".attn_q." in stored:
            values = _deinterleave(values, self._config.num_heads)
        if self._is_interleaved and ".attn_k." in stored:
            values = _deinterleave(values, self._config.num_kv_heads)
        _put(torch.from_numpy(np.ascontiguousarray(values[_part(span, dim)])), out, span, dim)
        self._left.discard(stored)

    def close(self) -> None:
        _refuse_surplus(self._left, self._file.path)


def _gguf_name(name: str) -> str:
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None:
        return _GGUF_NAMES[name]
    return f"blk.{match[1]}.{_GGUF_LAYER_NAMES[match[2]]}.{match[3]}"


def _deinterleave(values: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Rows of each head from rotating pairs (2i, 2i + 1), as llama.cpp does, to (i, i + head_dim / 2)."""
    rest = values.shape[1:]
    pairs = values.reshape(num_heads, -1, 2, *rest)
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _whole_shape(out: torch.Tensor, span: Span, dim: int) -> list[int]:
    """Shape of the tensor of which `out` is to have a part."""
    shape = list(out.shape)
    shape[dim] = span.whole
    return shape


def _part(span: Span | None, dim: int) -> tuple[slice, ...]:
    """What to read of a tensor."""
    if span is None:
        return (slice(None),)
    begin = min(span.begin, span.whole)  # a rank may have nothing of it
    return (*[slice(None)] * dim, slice(begin, begin + span.count))


def _put(part: torch.Tensor, out: torch.Tensor, span: Span | None, dim: int) -> None:
    """Write what was read of a tensor, and zeros behind it."""
    if span is None:
        out.copy_(part)
        return
    out.narrow(dim, 0, span.count).copy_(part)
    out.narrow(dim, span.count, span.size - span.count).zero_()


def _check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...], where: Path) -> None:
    if found != wanted:
        raise ModelLoadError(
            f"tensor {name} of {where} has shape {found}, but its configuration asks for {wanted}"
        )


def _refuse_surplus(names: set[str], where: Path) -> None:
    if names:
        shown = ", ".join(sorted(names)[:5])
        raise ModelLoadError(
            f"{where} holds {len(names)} tensors that its architecture has no place for, such as {shown}"
        )
