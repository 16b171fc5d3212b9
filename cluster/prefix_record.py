"""Which beginnings of prompts this router has sent where: a rough picture of the groups' prefix caches.

Each router has its own, of what it has sent itself; groups tell nothing. Where several ingress replicas serve
one model, a conversation that names its session (`x-session-id`) has the same home for all of them, by
rendezvous hashing; one that does not is found by the replica that saw it before, or computed once more.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from hashlib import blake2b
from typing import Generic, TypeVar

BLOCK_TOKENS = 64  # need not be the engine's: what is cached is estimated, to a block
_DIGEST_BYTES = 8  # two of 2^32 blocks are alike by chance; that costs a wrong estimate
_MAX_BLOCKS = 1024  # of one prompt: a prefix of 65,536 tokens outweighs any queue
_MAX_RECORDED = 32_768  # blocks of one group, 2 million tokens: about 4 MB

G = TypeVar("G", bound=Hashable)


def chain_of(tokens: Sequence[int], salt: str) -> list[bytes]:
    """Hashes of a prompt's full blocks, each over everything before it. 1.5 us a block."""
    before, chain = salt.encode(), []
    for start in range(0, min(len(tokens), _MAX_BLOCKS * BLOCK_TOKENS) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        content = array("q", tokens[start : start + BLOCK_TOKENS]).tobytes()
        before = blake2b(content, key=before[:64], digest_size=_DIGEST_BYTES).digest()
        chain.append(before)
    return chain


def key_of(session_id: str) -> bytes:
    """What `home_of` takes for a session."""
    return blake2b(session_id.encode(), digest_size=_DIGEST_BYTES).digest()


def home_of(key: bytes, groups: Sequence[Hashable]) -> int | None:
    """The index of the group that `key` belongs to: the same in every process, and for nearly every key the
    same after a group has come or gone (rendezvous hashing). None without groups.
    """

    def score(index: int) -> bytes:
        return blake2b(str(groups[index]).encode(), key=key[:64], digest_size=8).digest()

    return max(range(len(groups)), key=score, default=None)


class PrefixRecord(Generic[G]):
    """Blocks that were sent to each group, the newest last; the oldest are forgotten.

    Args:
        max_blocks: of each group.
    """

    def __init__(self, max_blocks: int = _MAX_RECORDED) -> None:
        self._max_blocks = max_blocks
        self._blocks: dict[G, OrderedDict[bytes, None]] = {}
        self._limits: dict[G, int] = {}

    def cached_tokens(self, group: G, chain: Sequence[bytes]) -> int:
        """Tokens at the beginning of a prompt that the group is believed to have."""
        blocks = self._blocks.get(group)
        if not blocks:
            return 0
        low, high = 0, len(chain)  # a block is forgotten before those that it goes on from
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if chain[middle] in blocks else (low, middle)
        return low * BLOCK_TOKENS

    def sent(self, group: G, chain: Sequence[bytes]) -> None:
        """A prompt goes to a group."""
        blocks = self._blocks.setdefault(group, OrderedDict())
        for digest in reversed(chain):
            blocks[digest] = None
            blocks.move_to_end(digest)
        while len(blocks) > self._limits.get(group, self._max_blocks):
            blocks.popitem(last=False)

    def limit(self, group: G, capacity_tokens: float) -> None:
        """A group's caches hold no more than that; 0 if it is not known."""
        if capacity_tokens > 0:
            blocks = int(capacity_tokens) // BLOCK_TOKENS
            self._limits[group] = max(1, min(self._max_blocks, blocks))

    def keep_only(self, groups: Iterable[G]) -> None:
        """Forgets all other groups."""
        kept = set(groups)
        self._blocks = {group: blocks for group, blocks in self._blocks.items() if group in kept}
        self._limits = {group: limit for group, limit in self._limits.items() if group in kept}

    def __len__(self) -> int:
        return sum(map(len, self._blocks.values()))
