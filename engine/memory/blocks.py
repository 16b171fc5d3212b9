"""Blocks of KV, the hashes by which they are found, and the books of a slot that holds some."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import takewhile

from engine.messages import BlockCopy

_DIGEST_BYTES = 16

Tokens = Callable[[int, int], Sequence[int]]


class TokenChain:
    """Hashes of a sequence's blocks, each over everything before it.

    Args:
        salt: sequences of different salts share nothing.
        tokens_per_block: T.
    """

    def __init__(self, salt: str, tokens_per_block: int) -> None:
        self._per_block = tokens_per_block
        self.root = blake2b(salt.encode(), digest_size=_DIGEST_BYTES).digest()
        self.digests: list[bytes] = []

    def extend(self, tokens: Tokens, num_tokens: int) -> None:
        """Hash the full blocks among a sequence's first `num_tokens` tokens."""
        while (len(self.digests) + 1) * self._per_block <= num_tokens:
            start = len(self.digests) * self._per_block
            content = array("q", tokens(start, start + self._per_block)).tobytes()
            before = self.digests[-1] if self.digests else self.root
            self.digests.append(blake2b(before + content, digest_size=_DIGEST_BYTES).digest())

    def after(self, num_blocks: int) -> bytes:
        """The hash that stands for the first `num_blocks` blocks."""
        return self.digests[num_blocks - 1] if num_blocks else self.root


class Block:
    """The KV of T tokens in every layer.

    Attributes:
        digest: by which it is found; None if it is not full yet, or another block has the same content.
        users: live sequences that read it.
        holders: slots in whose own rows it is mapped.
        is_ready: whether the step that computes it has been launched.
        draft: number of the draft that would compute it.
        read_until: newest step that may read it, once it has no users.
    """

    __slots__ = ("digest", "draft", "holders", "is_ready", "read_until", "users")

    def __init__(self, holder: int) -> None:
        self.digest: bytes | None = None
        self.users = 1
        self.holders = {holder}
        self.is_ready = False
        self.draft = 0
        self.read_until = 0


@dataclass(frozen=True, slots=True)
class Match:
    """What of a prompt is there.

    Attributes:
        slot: that holds it.
        num_blocks: full blocks in common.
        num_tokens: tokens in common, those blocks' included.
        is_in_place: whether the slot itself can go on.
        num_backed: blocks that need no new memory then.
        num_revived: those of them that nobody reads now, and that would no longer be evictable.
    """

    slot: int
    num_blocks: int
    num_tokens: int
    is_in_place: bool
    num_backed: int
    num_revived: int


@dataclass(slots=True)
class Slot:
    """The books of a slot that is live or closed.

    Attributes:
        blocks: from token 0 on; those of a live slot may not be backed yet.
        source, shared: the slot through which the first `shared` blocks are read.
        readers: slots that read this one, and how many blocks of it.
        copiers: slots that will copy from this one, and how many of its tokens they will have then.
        tokens: what a closed slot holds; None while it is live.
        tail: the hash after which a closed slot's unfinished block follows.
        num_ready, num_known: leading blocks that are computed, and whose hashes are known.
        pending: blocks of others that are not computed yet.
        copies_from: the slot that a block's beginning is to be copied from.
        last_used: counts up.
        wanted: waiting requests that will read it, and how urgent they are (smaller first).
    """

    blocks: list[Block] = field(default_factory=list)
    source: int | None = None
    shared: int = 0
    readers: dict[int, int] = field(default_factory=dict)
    copiers: dict[int, int] = field(default_factory=dict)
    tokens: Sequence[int] | None = None
    tail: bytes | None = None
    num_ready: int = 0
    num_known: int = 0
    pending: list[Block] = field(default_factory=list)
    copies_from: int | None = None
    last_used: int = 0
    wanted: dict[str, tuple[float, str]] = field(default_factory=dict)

    @property
    def is_closed(self) -> bool:
        return self.tokens is not None

    @property
    def worth(self) -> tuple[bool, float, int]:
        """What would be lost with a closed slot, the least first: what nobody waits for, then by urgency."""
        if not self.wanted:
            return False, 0.0, self.last_used
        return True, -min(self.wanted.values())[0], -self.last_used

    def num_read(self, tokens_per_block: int) -> int:
        """Leading blocks that other slots read through this one, or will copy from."""
        copied = [-(-count // tokens_per_block) for count in self.copiers.values()]
        return max([*self.readers.values(), *copied, 0])

    def num_pinned(self, tokens_per_block: int) -> int:
        """Leading blocks that must stay where they are."""
        in_use = sum(1 for _ in takewhile(lambda block: block.users > 0, self.blocks))
        return max(self.shared, in_use, self.num_read(tokens_per_block))


@dataclass(frozen=True, slots=True)
class Opened:
    """A slot for a sequence, and what it already holds of it.

    Attributes:
        num_tokens: tokens that need not be computed.
        shared_slot, shared_tokens: the slot through which its first tokens are read.
        copy: to be made before the sequence's first piece is computed.
    """

    slot: int
    num_tokens: int = 0
    shared_slot: int = 0
    shared_tokens: int = 0
    copy: BlockCopy | None = None
