"""Prompts whose beginnings come from the balloon: they have a slot, and compute from where those end."""

from __future__ import annotations

from engine.memory.blocks import Opened
from engine.memory.pool import MemoryPool
from engine.sequence import Sequence


class Fetching:
    """Sequences that wait in their slot for what is being copied there.

    Attributes:
        num_found: tokens of prompts that were found in the balloon, of sequences that began to run.
        num_fetches: prompts of which a beginning was.

    Args:
        pool: the one door to memory.
    """

    def __init__(self, pool: MemoryPool) -> None:
        self._pool = pool
        self._coming: list[Sequence] = []
        self.num_found = 0
        self.num_fetches = 0

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
        self.num_fetches += 1
        return fetched

    def settle(self) -> None:
        """Let those go on whose beginnings have arrived."""
        prefixes = self._pool.host_prefixes
        if prefixes is None or not self._coming:
            return
        self._coming = [seq for seq in self._coming if seq.is_arriving]  # others lost their slots
        for seq in self._coming:
            num_tokens = prefixes.arrived(seq.backing, seq.held_slot, seq.chain)
            if num_tokens is not None:
                self.num_found += 0 if seq.num_preemptions else num_tokens - seq.num_found
                seq.found(num_tokens)
        self._coming = [seq for seq in self._coming if seq.is_arriving]
