"""What is undone on a rank when another one did not get as far with the same move."""

from __future__ import annotations

from collections.abc import Iterable

from engine.errors import DriverError
from engine.memory.vmm import Move, Moved, Outcome, VirtualMemory

NO_HANDLE = 2**64 - 1  # on the wire: 0 is a handle like any other in host memory

# The less was done, the further back: what was not done on one rank can be undone on the others.
_ORDER = (Outcome.DONE, Outcome.UNMAPPED, Outcome.STAYED, Outcome.NOT_MADE)


def worst(outcomes: Iterable[Outcome]) -> Outcome:
    """The outcome that all ranks can be brought to."""
    return max(outcomes, key=_ORDER.index)


def bring(vm: VirtualMemory, move: Move, moved: Moved, outcome: Outcome) -> Moved | None:
    """Undo as much of a move as another rank has not done.

    Args:
        moved: how it ended here.
        outcome: how it is to have ended.

    Returns:
        How it has ended now; None if the driver refused.
    """
    if moved.outcome is outcome or moved.handle is None:
        return moved if moved.outcome is outcome else None
    if moved.outcome is Outcome.DONE and move.target and vm.unmap([move.target]) != 1:
        return None
    if outcome is Outcome.NOT_MADE:
        return Moved(None, outcome) if vm.release([moved.handle]) == 1 else None
    if outcome is Outcome.STAYED:
        try:
            vm.map([move.source or 0], [moved.handle])
        except DriverError:
            return None
    return Moved(moved.handle, outcome)
