"""Where a rank stands in its TP group, and where the ranks meet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Light to import, cheap to pickle.

    Attributes:
        rank: 0 plans, the others follow.
        size: ranks of the group, all on one node.
        directory: of that node, made for this group alone, open to nobody else: whoever can write to a socket
            in it commands the ranks.
    """

    rank: int
    size: int
    directory: str

    @property
    def socket(self) -> str:
        """Where the first rank listens."""
        return str(Path(self.directory) / "plan")

    @property
    def store(self) -> Path:
        """The file through which the collectives find one another."""
        return Path(self.directory) / "store"
