"""The requests that wait to start, the one whose first token is due first at the head."""

from __future__ import annotations

from bisect import insort

from engine.memory.pool import MemoryPool
from engine.sequence import Sequence

_NO_DRAFT = -1
_PRIORITY_S = 10.0  # of waiting that one step of priority is worth


class WaitingLine:
    """Sequences without KV: new, or to be computed again. What they will read of others' KV is kept longest.

    A deadline stays where it is while others come and go, so whoever waits long enough is next: nobody
    starves behind requests of higher priority.

    Args:
        pool: where their beginnings may be.
        by_deadline: whether a request's own promise counts; otherwise arrival alone.
    """

    def __init__(self, pool: MemoryPool, by_deadline: bool) -> None:
        self._pool = pool
        self._by_deadline = by_deadline
        self._line: list[Sequence] = []
        self.num_lacking_tokens = 0

    def __len__(self) -> int:
        return len(self._line)

    def __getitem__(self, place: int) -> Sequence:
        return self._line[place]

    def first(self, count: int) -> list[Sequence]:
        """Those at the head."""
        return self._line[:count]

    def add(self, seq: Sequence) -> None:
        """Let a sequence wait, at the place that its deadline gives it."""
        insort(self._line, seq, key=self._urgency)
        match = self._pool.match(seq.chain, seq.tokens, seq.num_known, _NO_DRAFT)
        seq.num_lacking = seq.num_tokens
        if match is not None:
            seq.wants = match.slot
            seq.num_lacking -= match.num_tokens
            self._pool.prefixes.want(match.slot, seq.request_id, self._urgency(seq))
        self.num_lacking_tokens += seq.num_lacking

    def remove(self, seq: Sequence) -> None:
        """It starts, or has ended."""
        self._line.remove(seq)
        self.num_lacking_tokens -= seq.num_lacking
        if seq.wants is not None:
            self._pool.prefixes.unwant(seq.wants, seq.request_id)
            seq.wants = None

    def _urgency(self, seq: Sequence) -> tuple[float, str]:
        due_s = seq.arrival_s + seq.request.priority * _PRIORITY_S
        return due_s + (seq.ttft_slo_s if self._by_deadline else 0.0), seq.request_id
