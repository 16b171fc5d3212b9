"""Tables of rotary position embedding, with the scalings that stretch a model's context."""

from __future__ import annotations

import math

import torch

from engine.model.architecture import RopeConfig


def rope_tables(
    rope: RopeConfig, head_dim: int, max_positions: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, each (max_positions, head_dim / 2) float32, of position times frequency."""
    # On the CPU whatever the device: the tables are then the same everywhere, to the last bit.
    frequencies = _frequencies(rope, head_dim)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequencies)
    return angles.cos().to(device), angles.sin().to(device)


def _frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / (rope.theta**exponents)
    if rope.scaling == "linear":
        return plain / rope.factor
    if rope.scaling == "divisors":
        return plain / torch.tensor(rope.divisors, dtype=torch.float32)
    if rope.scaling == "llama3":
        return _llama3(plain, rope)
    return plain


def _llama3(plain: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Long waves are stretched by `factor`, short ones kept, those between blended."""
    wavelengths = 2 * math.pi / plain
    turns = rope.original_max_positions / wavelengths
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1.0 - blend) * plain / rope.factor + blend * plain
