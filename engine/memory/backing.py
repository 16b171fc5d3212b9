"""What of a sequence's KV is in the balloon: the books of one sequence, which `Parking` keeps."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.memory.copies import Ticket
from engine.memory.host_rows import HostRow


@dataclass(slots=True, eq=False)
class Backing:
    """What of one sequence's KV is in the balloon, and, while it is parked, what is not on the device.

    Attributes:
        begin: first row that `rows` has.
        rows: in the balloon, of those from `begin` on.
        slot: of a parked sequence, if it keeps one.
        first, end: rows of a parked sequence that may leave the device.
        absent: layer groups that have left.
        read_until: the newest step that may read it, when it was parked.
        num_to_leave: layer groups that will leave once the balloon has all of it.
        is_parked: from then on until it has come back.
        is_leaving: the balloon has not all of it yet.
        coming: the copy that brings it back.
        has_failed: the copy to the balloon was refused, and it is still where it was.
        is_lost: the copy back was refused, and what its slot holds is not its KV.
    """

    begin: int = 0
    rows: list[HostRow] = field(default_factory=list)
    slot: int | None = None
    first: int = 0
    end: int = 0
    absent: set[int] = field(default_factory=set)
    read_until: int = 0
    num_to_leave: int = 0
    is_parked: bool = False
    is_leaving: bool = False
    coming: Ticket | None = None
    has_failed: bool = False
    is_lost: bool = False

    @property
    def saved_until(self) -> int:
        """The row up to which the balloon has everything from `begin` on."""
        return self.begin + len(self.rows)

    @property
    def num_rows(self) -> int:
        """Rows of a parked sequence that may leave the device."""
        return self.end - self.first
