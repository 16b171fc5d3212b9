"""What the first rank and the others tell one another while they start."""

from __future__ import annotations

from dataclasses import dataclass

LAYER_DONE = "layer done"  # between two layers of a step, each rank does what the first one did there


@dataclass(frozen=True, slots=True)
class Ranges:
    """Where the first rank's pool is, in its addresses.

    Attributes:
        arena, groups: address and chunks of the arena, and of each layer group's KV.
        rows_per_slot: of `KvViews`.
    """

    arena: tuple[int, int]
    groups: tuple[tuple[int, int], ...]
    rows_per_slot: int
