"""Prompts whose beginnings come from the balloon: they have a slot, and compute from where those end."""

from __future__ import annotations

from collections import Counter

from engine.memory.blocks import Opened
from engine.memory.pool import MemoryPool
from engine.sequence import Sequence


class Fetching:
    """Sequences that wait in their slot for what is being copied there.

    Args:
        pool: the one door to memory.
        decisions: where each fetch is counted.
    """

    def __init__(self, pool: MemoryPool, decisions: Counter[str]) -> None:
        self._pool = pool
        self._decisions = decisions
        self._coming: list[Sequence] = []

    def begin(self, seq: Sequence, opened: Opened) -> Opened:
        """Let a sequence that moves into a slot have there what the balloon has of it; what is there now."""
        prefixes = self._pool.host_prefixes
        if prefixes is None:
            return opened
        prefixes.adopt(seq.backing, opened, seq.chain)
        fetched = prefixes.fetch(seq.backing, opened, seq.chain, seq.num_tokens)
        if fetched is None:
            return opened
        self._coming.append(seq)
        self._decisions["fetch_prefix"] += 1
        return fetched

    def settle(self) -> int:
        """Let those go on whose beginnings have arrived; tokens that came so for sequences that start."""
        prefixes, num_found = self._pool.host_prefixes, 0
        if prefixes is None or not self._coming:
            return 0
        coming, self._coming = self._coming, []
        for seq in dict.fromkeys(coming):
            if not seq.is_arriving:
                continue  # it lost its slot
            num_tokens = prefixes.arrived(seq.backing, seq.held_slot, seq.chain)
            if num_tokens is None:
                self._coming.append(seq)
                continue
            num_found += 0 if seq.num_preemptions else num_tokens - seq.num_found
            seq.found(num_tokens)
        return num_found
