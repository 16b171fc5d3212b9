"""Rows of KV in the balloon: who uses them, and those that nobody uses any more but prompts may find.

A row is a chunk of each layer group, as on the device: the KV of T tokens in every layer. Copies of live
sequences are used by them. What a sequence leaves behind is kept under the hash of its tokens, like blocks
on the device (`prefix.py`), as long as nobody needs the host memory; the row used least recently goes first,
and of one sequence the last, since a row is worth nothing without those before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile

from engine.errors import ConservationError
from engine.memory.balloon import Balloon


class HostRow:
    """The KV of T tokens in every layer.

    Attributes:
        chunks: host chunks, one of each layer group.
        digest: by which it is found; None if it is not.
        users: sequences and copies under way that need it.
    """

    __slots__ = ("chunks", "digest", "users")

    def __init__(self, chunks: tuple[int, ...]) -> None:
        self.chunks = chunks
        self.digest: bytes | None = None
        self.users = 1


class HostRows:
    """Gives out the balloon's chunks in rows, and takes them back.

    Args:
        balloon: host memory.
        num_groups: layer groups, hence chunks of a row.
    """

    def __init__(self, balloon: Balloon, num_groups: int) -> None:
        self.balloon = balloon
        self._num_groups = num_groups
        self._index: dict[bytes, HostRow] = {}
        self._idle: dict[HostRow, None] = {}  # in the order in which they are given up

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._index

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        return self._num_groups * self.balloon.chunk_bytes

    @property
    def num_cached(self) -> int:
        """Host chunks that nobody uses, and whose KV prompts may find."""
        return len(self._idle) * self._num_groups

    @property
    def num_spare(self) -> int:
        """Rows that `take` could give out now."""
        return (self.balloon.num_spare + self.num_cached) // self._num_groups

    def take(self, count: int) -> list[HostRow] | None:
        """`count` rows with one user each, or None if there are too few now: nothing is given up then.

        Group after group, as they lie in address space on the device: then neighbours are copied as one.
        """
        num_chunks = count * self._num_groups
        host = self.balloon.take(num_chunks)
        if host is None and count <= self.num_spare:
            self._give_up(-(-(num_chunks - self.balloon.num_spare) // self._num_groups))
            host = self.balloon.take(num_chunks)
        return None if host is None else [HostRow(tuple(host[at::count])) for at in range(count)]

    def would_do(self, count: int, num_given_up: int) -> bool:
        """Whether `count` rows could be taken once so many have been given up. Where more is taken than the
        newest order allows, that makes good for it first.
        """
        owed = -(-max(0, self.balloon.num_used - self.balloon.num_logical) // self._num_groups)
        return count + owed <= self.num_spare + num_given_up

    def use(self, rows: Iterable[HostRow]) -> None:
        """One user more for each."""
        for row in rows:
            self._idle.pop(row, None)
            row.users += 1

    def release(self, rows: Sequence[HostRow]) -> None:
        """One user less for each. A row that nobody uses stays if it can be found, and no order is against
        it; it is free otherwise.

        No copy from or into those rows may be under way for that user.
        """
        free: list[int] = []
        for row in reversed(rows):
            row.users -= 1
            if row.users:
                continue
            is_over = self.balloon.num_used - len(free) > self.balloon.num_logical
            if row.digest is None or is_over or self._must_go(row):
                self._forget(row)
                free += row.chunks
            else:
                self._idle[row] = None
        self.balloon.put_back(free)

    def remember(self, row: HostRow, digest: bytes) -> None:
        """Let a row with users be found by the hash of its tokens, unless another with the same is."""
        if row.digest is None and digest not in self._index:
            row.digest = digest
            self._index[digest] = row

    def find(self, digests: Iterable[bytes]) -> list[HostRow]:
        """Rows of these hashes, up to the first that is not there."""
        return [self._index[digest] for digest in takewhile(self._index.__contains__, digests)]

    def deflate(self) -> None:
        """Give up rows that nobody uses and that an order leaves no room for: those in slabs that are to go
        back to the host, then as many as are beyond the balloon's logical size.
        """
        for row in [row for row in self._idle if self._must_go(row)]:
            del self._idle[row]
            self._forget(row)
            self.balloon.put_back(row.chunks)
        excess = self.balloon.num_used - self.balloon.num_logical
        self._give_up(max(0, -(-excess // self._num_groups)))

    def forget_idle(self) -> None:
        """Give up all rows that nobody uses."""
        self._give_up(len(self._idle))

    def check(self, users: Mapping[HostRow, int]) -> None:
        """Raise ConservationError unless these are all users, and every host chunk in use is one row's."""
        self.balloon.check()
        wrong = [row for row in {**users, **self._idle} if row.users != users.get(row, 0)]
        if wrong or any(row.users for row in self._idle):
            raise ConservationError(f"{len(wrong)} rows in the balloon have other users than they count")
        used = Counter(chunk for row in {**users, **self._idle} for chunk in row.chunks)
        if len(used) != self.balloon.num_used or used.total() != len(used):
            raise ConservationError(
                f"{used.total()} chunks are in rows, and {self.balloon.num_used} of the balloon's are used"
            )
        if any(self._index.get(row.digest) is not row for row in self._idle if row.digest is not None):
            raise ConservationError("a row that is kept is not found by its hash")
        if any(row not in self._idle and row not in users for row in self._index.values()):
            raise ConservationError("the index finds a row that is free")

    def _give_up(self, count: int) -> None:
        for row in list(self._idle)[:count]:
            del self._idle[row]
            self._forget(row)
            self.balloon.put_back(row.chunks)

    def _must_go(self, row: HostRow) -> bool:
        """Whether a slab that the row has a chunk in is to go back to the host."""
        return any(map(self.balloon.is_leaving, row.chunks)) if self.balloon.is_shrinking else False

    def _forget(self, row: HostRow) -> None:
        """Nobody finds it any more."""
        if row.digest is not None:
            del self._index[row.digest]
            row.digest = None
