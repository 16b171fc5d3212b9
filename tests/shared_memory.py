"""One device for several drivers: together they get no more chunks than it has, as on a GPU."""

from __future__ import annotations

import errno
from typing import Any

from engine.memory.driver import ChunkDriver


class OneDevice:
    """Counts what its drivers have made, and refuses to make more.

    Args:
        num_chunks: that there are.

    Attributes:
        num_made: now.
        most: ever.
        num_refused: creates refused so far.
    """

    def __init__(self, num_chunks: int) -> None:
        self.num_chunks = num_chunks
        self.num_made = self.most = self.num_refused = 0

    def add(self, driver: ChunkDriver) -> None:
        """A driver whose calls are made from Python takes its chunks from here."""
        calls: Any = driver._mapper.calls  # type: ignore[attr-defined]
        create, release = calls.create, calls.release

        def create_one() -> tuple[int, int]:
            if self.num_made >= self.num_chunks:
                self.num_refused += 1
                return errno.ENOMEM, 0
            code, handle = create()
            self.num_made += not code
            self.most = max(self.most, self.num_made)
            return code, handle

        def release_one(handle: int) -> int:
            code: int = release(handle)
            self.num_made -= not code
            return code

        calls.create, calls.release = create_one, release_one
