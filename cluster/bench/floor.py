"""The least time a workload can take on a device: its bytes and FLOPs, counted, over the device's ceilings.

Counted are what no implementation avoids: every matrix product, attention over the causal half, the
weights once for each token of the longest answer (of a session, of all its answers), and each answer
token's reading of the KV before it. Equal prefixes are computed, and read in a step, once (`sharing`).
Speculation would change the count; nothing here uses it. A model that is counted in another way
(quantised weights, experts, latent or windowed attention) is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.bench.sharing import Reuse, reuse_of
from cluster.bench.workload import BenchError, PlannedRequest, Workload


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What a device gives at best: bytes/s read from memory, FLOP/s of bf16 products."""

    name: str
    bytes_per_s: float
    flop_per_s: float


# H100 SXM. Memory by NVIDIA's data sheet: a device copy reaches 3.0 TB/s, but half of its traffic is
# writes, and our decode attention, which reads, reaches 3.07. Products as measured: 8192 x 8192 x 8192 in
# bf16 through cuBLAS.
CEILINGS = {"h100": Ceiling("NVIDIA H100 80GB HBM3", 3.35e12, 798e12)}

# Fields of a config.json: one with a value means that the count below is not the model's.
_OTHER_SHAPES = ("quantization_config", "kv_lora_rank")
_GATED = (None, "silu", "swish")  # activations of a feed-forward of three products, as Llama's is


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes that count, of a decoder of the Llama shape in a 16-bit type."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    bytes_per_value: int = 2

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """From the fields of a Hugging Face `config.json`.

        Raises:
            BenchError: a field is missing or no size, or the model is not of the Llama shape.
        """
        _refuse_other_shapes(config)
        heads = _size(config, "num_attention_heads")
        hidden = _size(config, "hidden_size")
        return cls(
            hidden=hidden,
            intermediate=_size(config, "intermediate_size"),
            layers=_size(config, "num_hidden_layers"),
            heads=heads,
            kv_heads=_size(config, "num_key_value_heads", heads),
            head_dim=_size(config, "head_dim", hidden // heads),
            vocab=_size(config, "vocab_size"),
        )

    @property
    def layer_weights(self) -> int:
        """Weights of the products of all layers."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_weights(self) -> int:
        """Weights of the product that makes logits."""
        return self.hidden * self.vocab

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.bytes_per_value

    @property
    def weight_bytes(self) -> int:
        """What one decode step reads of the weights; of the embedding it reads a row a token."""
        return (self.layer_weights + self.head_weights) * self.bytes_per_value

    def attention_flop(self, pairs: float) -> float:
        """Of that many (query, key) pairs in all layers: scores and values, 2 FLOPs a product."""
        return 4.0 * self.layers * self.heads * self.head_dim * pairs


def _size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A field that is a whole number above 0; `default` stands for one that is absent or null."""
    value = config.get(name)
    if value is None and default is not None:
        return default
    if name not in config:
        raise BenchError(f"the model's configuration has no {name!r}: it is not of the Llama shape")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BenchError(f"{name} of the model's configuration is {value!r}, not a whole number above 0")
    return value


def _refuse_other_shapes(config: Mapping[str, Any]) -> None:
    """Refuse a model that the count would be wrong for, naming the field that says so.

    Raises:
        BenchError: its weights are not 16 bits wide, it has experts or a feed-forward without a gate, its
            KV is compressed, or some of its layers do not attend to the whole context.
    """
    fields = [name for name in config if name in _OTHER_SHAPES or "experts" in name]
    # Qwen models name a window that they do not use.
    if config.get("use_sliding_window") is not False:
        fields.append("sliding_window")
    found = [name for name in fields if config.get(name)]
    if config.get("hidden_act") not in _GATED:
        found.append("hidden_act")
    layers = config.get("layer_types")
    if layers and (not isinstance(layers, list) or any(kind != "full_attention" for kind in layers)):
        found.append("layer_types")
    if found:
        raise BenchError(
            f"bytes and FLOPs are counted for models of the Llama shape only, and the model's configuration "
            f"has {', '.join(found)}: leave --model-config out"
        )


@dataclass(frozen=True, slots=True)
class Floor:
    """The least a workload can cost.

    Attributes:
        flop, read_bytes: of the whole workload.
        floor_s: no schedule is faster: compute and memory both busy all the time, and no request faster
            than it would be alone from its arrival on.
        phases_s: all prefills at the FLOP ceiling, then all decodes at the byte ceiling: what a schedule
            that never overlaps the two can reach.
    """

    flop: float
    read_bytes: float
    floor_s: float
    phases_s: float
    ceiling: Ceiling

    def as_json(self) -> dict[str, Any]:
        """Plain values for the result line."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Cost:
    """What one request costs at least.

    Attributes:
        kept_bytes: KV of earlier turns that its prefill reads.
        kv_bytes: KV that its decode steps read, without what another sequence of the same step reads.
    """

    prefill_flop: float
    decode_flop: float
    kept_bytes: float
    kv_bytes: float

    @classmethod
    def of(cls, request: PlannedRequest, reuse: Reuse, shape: ModelShape) -> _Cost:
        steps = request.output_tokens - 1
        fresh = request.prompt_tokens - reuse.cached
        pairs = fresh * reuse.cached + fresh * (fresh + 1) / 2
        grown = steps * (steps + 1) / 2  # keys of tokens that the answer itself has, over all steps
        products = 2.0 * steps * (shape.layer_weights + shape.head_weights)
        return cls(
            prefill_flop=2.0 * (fresh * shape.layer_weights + shape.head_weights)
            + shape.attention_flop(pairs),
            decode_flop=products + shape.attention_flop(steps * request.prompt_tokens + grown),
            kept_bytes=(reuse.cached - reuse.common) * shape.kv_bytes_per_token,
            kv_bytes=(steps * (request.prompt_tokens - reuse.common) + grown) * shape.kv_bytes_per_token,
        )


def floor_of(workload: Workload, shape: ModelShape, ceiling: Ceiling) -> Floor:
    """Bytes, FLOPs and times of a workload that runs as one batch wherever arrivals allow it."""
    reuses = reuse_of(workload)
    costs = [_Cost.of(r, reuse, shape) for r, reuse in zip(workload.requests, reuses, strict=True)]
    passes, turns = max((reuse.passes, reuse.turns) for reuse in reuses)
    kv_bytes = sum(cost.kv_bytes for cost in costs)
    read_bytes = passes * shape.weight_bytes + kv_bytes + sum(cost.kept_bytes for cost in costs)
    prefill_flop = sum(cost.prefill_flop for cost in costs)
    decode_flop = sum(cost.decode_flop for cost in costs)
    decode_bytes = (passes - turns) * shape.weight_bytes + kv_bytes
    decode_s = max(decode_bytes / ceiling.bytes_per_s, decode_flop / ceiling.flop_per_s)
    phases_s = prefill_flop / ceiling.flop_per_s + decode_s
    flop = prefill_flop + decode_flop
    alone_s = _longest_alone_s(workload, costs, shape, ceiling)
    floor_s = max(flop / ceiling.flop_per_s, read_bytes / ceiling.bytes_per_s, alone_s)
    return Floor(flop, read_bytes, floor_s, max(phases_s, floor_s), ceiling)


def _longest_alone_s(
    workload: Workload, costs: Sequence[_Cost], shape: ModelShape, ceiling: Ceiling
) -> float:
    """When the last request ends if each session has the device to itself: from its arrival, turn by turn
    a prefill and then a step for each further token.
    """
    ends: list[float] = []
    for request, cost in zip(workload.requests, costs, strict=True):
        start_s = request.arrival_s if request.follows is None else ends[request.follows] + request.think_s
        prefill_bytes = shape.weight_bytes + cost.kept_bytes
        prefill_s = max(cost.prefill_flop / ceiling.flop_per_s, prefill_bytes / ceiling.bytes_per_s)
        read = (request.output_tokens - 1) * shape.weight_bytes + cost.kv_bytes
        ends.append(start_s + prefill_s + read / ceiling.bytes_per_s)
    return max(ends)


def read_shape(path: Path) -> ModelShape:
    """The shape in a `config.json`, or in a directory that has one.

    Raises:
        BenchError: it cannot be read.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise BenchError(f"--model-config {file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise BenchError(f"--model-config {file} is not a JSON object")
    return ModelShape.from_config(config)
