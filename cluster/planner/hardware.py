"""What is known of GPUs: the figures of a plan where nobody has measured, each with its source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.calibration import Calibration, StepRates
from engine.config import MemoryConfig
from engine.errors import ConfigError

if TYPE_CHECKING:
    from engine.simulation import EngineShape  # loads torch

GIB = 1 << 30
_LAUNCH_S = 0.35e-3
_SUM_S = 12e-6
_OUTSIDE_BYTES = int(1.5 * GIB)
_LOAD_S = 8.0
_PIN_S = 0.67


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU's rates, as far as a decoder of the Llama shape in 16 bits reaches them.

    Attributes:
        memory_bytes: that a process finds free before it starts.
        read_bytes_s: of weights and KV.
        product_flop_s, attention_flop_s: of matrix products, and of attention over prompts.
        link_bytes_s: to pinned host memory, each way.
    """

    name: str
    memory_bytes: int
    read_bytes_s: float
    product_flop_s: float
    attention_flop_s: float
    link_bytes_s: float
    source: str


_H100 = (
    "measured on an H100 80GB (tests/bench/README.md): 8B in bf16, 5.35 ms a token alone, prompts at "
    "600 TFLOP/s, attention 550 TFLOP/s, KV at 2.95 TB/s, copies at 50 GiB/s"
)
GPUS = {
    "h100": Gpu("NVIDIA H100 80GB", int(79.2 * GIB), 2.97e12, 600e12, 550e12, 50 * GIB, _H100),
    "h200": Gpu(
        "NVIDIA H200 141GB",
        int(139.0 * GIB),
        4.2e12,
        600e12,
        550e12,
        50 * GIB,
        f"the H100's figures with memory 1.4 times as fast, by data sheet; not measured. {_H100}",
    ),
    "a10g": Gpu(
        "NVIDIA A10G 24GB",
        int(22.0 * GIB),
        0.55e12,
        70e12,
        60e12,
        12 * GIB,
        "NVIDIA's data sheet less a third; not measured",
    ),
}


def default_calibration(
    gpu_name: str | None, shape: EngineShape, num_ranks: int, memory: MemoryConfig, model_id: str
) -> Calibration:
    """A plan's figures for a model on that GPU, from the rates that are known.

    Raises:
        ConfigError: no such GPU is known, or its memory does not hold the weights.
    """
    gpu = GPUS.get((gpu_name or "").lower())
    if gpu is None:
        what = f"nothing is known of the GPU {gpu_name}." if gpu_name else "which GPU is it for?"
        raise ConfigError(
            f"{model_id}: {what} Name one of {', '.join(GPUS)} with --gpu (or accelerator_type in the file), "
            "or measure on such a machine with --calibrate, and give --calibration"
        )
    weights = shape.num_weights * shape.itemsize // num_ranks
    products = shape.num_products * shape.itemsize / num_ranks
    layers = shape.num_layers
    sums_s = 2 * layers * _SUM_S if num_ranks > 1 else 0.0
    rates = StepRates(
        products / gpu.read_bytes_s + _LAUNCH_S + sums_s,
        2.0 * shape.num_products / num_ranks / gpu.product_flop_s,
        shape.geometry.bytes_per_token / gpu.read_bytes_s,
        4.0 * layers * shape.attention_width / num_ranks / gpu.attention_flop_s,
    )
    part = "" if memory.device_share == 1 else f" ({memory.device_share:.0%} of it)"
    pool = int(gpu.memory_bytes * memory.device_share) - weights - memory.margin_bytes - _OUTSIDE_BYTES
    sources = {
        "steps": f"{gpu.name}: {gpu.source}; rates times this model's bytes and FLOPs",
        "pool_bytes": f"{gpu.name}'s memory{part} less weights, margin_bytes and 1.5 GiB for graphs, tables "
        "and torch, as beside an 8B model on an H100",
        "load_s": "8 s measured for random weights with kernels cached (README.md); reading a checkpoint "
        "comes on top: --load-s",
        "pin_s_per_gib": "measured on an H100's host: 16 GiB in 10.7 s",
    }
    if num_ranks > 1:
        sources["ranks"] = (
            f"{num_ranks} GPUs a copy share products and KV; two sums a layer at 12 us each, assumed"
        )
    if pool <= 0:
        raise ConfigError(f"{model_id}: {weights / GIB:.1f} GiB of weights do not fit a {gpu.name}{part}")
    return Calibration(rates, gpu.link_bytes_s, _PIN_S, _LOAD_S, pool, "cuda", sources)
