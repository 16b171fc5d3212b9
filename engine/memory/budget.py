"""How many chunks a pool may have: by configuration, by the controller's limit, and by what the driver gives.

made + unmade == total, and total is at most the limit once what is beyond it has been given back
"""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


class Budget:
    """Counts chunks; has none itself.

    Attributes:
        total: chunks that there are or may yet be made.
        num_unmade: of them, those without memory.
        num_refused: those that the driver would not make, out of the total until `ask_again`.
        configured: the total without a limit and without refusals.
        limit: that holds instead; None where nobody has set one.
    """

    def __init__(self, total: int) -> None:
        self.total = self.num_unmade = self.configured = total
        self.num_refused = 0
        self.limit: int | None = None
        self._least_told = total

    @property
    def num_excess(self) -> int:
        """Chunks made beyond what there may be: the next that are free go back to the driver."""
        return max(0, self.total - self._most)

    @property
    def _most(self) -> int:
        return self.configured if self.limit is None else self.limit

    def resize(self, total: int) -> None:
        """Another configured total, no smaller than what has been made."""
        self._set(total)
        self.configured = self.total + self.num_refused

    def restrict(self, limit: int | None) -> None:
        """At most so many, whatever is configured: more as well as fewer. None is what is configured."""
        self.limit = limit
        self.num_refused = 0
        self._set(self._most)

    def made(self, count: int) -> None:
        """So many have memory now that had none."""
        self.num_unmade -= count

    def unmade(self, count: int) -> None:
        """So many have no memory any more; what was beyond the limit is gone for good."""
        self.num_unmade += count
        gone = min(self.num_excess, self.num_unmade)
        self.total -= gone
        self.num_unmade -= gone

    def refuse(self) -> None:
        """The device has no more memory: do with what there is, until `ask_again`."""
        left = self.total - self.num_unmade
        if left < self._least_told:  # said once, however often it is asked for again
            self._least_told = left
            logger.warning("the pool shrinks from %d to %d chunks: the device has no more", self.total, left)
        self.num_refused += self.num_unmade
        self._set(0)

    def ask_again(self) -> None:
        """Count chunks that the driver once refused as obtainable again: its memory may be back."""
        self._set(self.total + self.num_refused)
        self.num_refused = 0

    def _set(self, total: int) -> None:
        total = max(total, self.total - self.num_unmade)
        self.num_unmade += total - self.total
        self.total = total
