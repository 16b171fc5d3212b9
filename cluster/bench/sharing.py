"""What of a workload an engine that shares prefixes perfectly computes, and reads, only once.

Nothing is ever forgotten here, and a prefix is there as soon as its first request is: a bound for floors,
not a cache. Prompts that are known as text alone share nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cluster.bench.workload import Workload


class Reuse(NamedTuple):
    """Of one request.

    Attributes:
        cached: tokens of its prompt that were computed for another request, or for an earlier turn.
        common: those of them that another session has too, so that one reading may serve both.
        passes: passes over the weights up to the end of its answer, from its session's first turn on.
        turns: turns of its session up to it, itself included.
    """

    cached: int
    common: int
    passes: int
    turns: int


class _Prefixes:
    """Every prompt so far, as a tree of its parts."""

    def __init__(self) -> None:
        self._longest: dict[tuple[int, str], int] = {}  # (node, label) -> tokens of that label seen behind it
        self._next: dict[tuple[int, str, int], int] = {}

    def add(self, parts: Sequence[tuple[str, int]]) -> int:
        """Tokens that the prompt shares with an earlier one, from its start on."""
        node = shared = 0
        shares = True
        for label, length in parts:
            if shares:
                shared += min(length, self._longest.get((node, label), 0))
                shares = (node, label, length) in self._next
            self._longest[node, label] = max(length, self._longest.get((node, label), 0))
            node = self._next.setdefault((node, label, length), len(self._next) + 1)
        return shared


def reuse_of(workload: Workload) -> list[Reuse]:
    """Of each request, in order.

    Every prompt computes its last token at least, for its logits; and the last token of an answer was
    never computed, so a turn behind it computes that too.
    """
    prefixes = _Prefixes()
    found: list[Reuse] = []
    for request in workload.requests:
        limit = request.prompt_tokens - 1
        if request.follows is None:
            common = min(prefixes.add(request.parts), limit)
            found.append(Reuse(common, common, request.output_tokens, 1))
        else:
            before, earlier = workload.requests[request.follows], found[request.follows]
            held = before.prompt_tokens + before.output_tokens - 1
            found.append(
                Reuse(
                    min(held, limit),
                    min(earlier.common, limit),
                    earlier.passes + request.output_tokens,
                    earlier.turns + 1,
                )
            )
    return found
