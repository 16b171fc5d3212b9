"""The requests that wait to start: those that can be in time first, the one that is due first at the head."""

from __future__ import annotations

from bisect import insort

from engine.memory.pool import MemoryPool
from engine.memory.prefix import NO_DRAFT
from engine.sequence import Sequence

_LATE_TURN = 4
_LOOK_AHEAD = 32
_HEADS = 8  # those that are due first came about first, and a snapshot is taken every step
_PRIORITY_S = 10.0  # of waiting that one step of priority is worth


class WaitingLine:
    """Sequences without KV: new, or to be computed again. What they will read of others' KV is kept longest.

    A deadline stays where it is while others come and go, so whoever waits long enough is next: nobody
    starves behind requests of higher priority. Those whose deadline has passed are late whatever is done, and
    would make all behind them late as well: they go behind, and every `_LATE_TURN`th start is theirs.

    Args:
        pool: where their beginnings may be.
        by_deadline: whether a request's own promise counts; otherwise arrival alone.
    """

    def __init__(self, pool: MemoryPool, by_deadline: bool) -> None:
        self._pool = pool
        self._by_deadline = by_deadline
        self._line: list[Sequence] = []
        self._late: list[Sequence] = []
        self._num_started = 0  # since one of those that are late was
        self.num_lacking_tokens = 0

    def __len__(self) -> int:
        return len(self._line) + len(self._late)

    @property
    def is_late(self) -> bool:
        """Whether somebody waits longer for the first token than was promised."""
        return bool(self._late)

    @property
    def num_late(self) -> int:
        """Those that wait longer than that."""
        return len(self._late)

    def oldest_s(self, now_s: float) -> float:
        """How long one of those that came first has waited for its first token; 0 if nobody does."""
        heads = (*self._line[:_HEADS], *self._late[:_HEADS])
        arrivals = [seq.arrival_s for seq in heads if seq.first_token_s is None]
        return now_s - min(arrivals, default=now_s)

    @property
    def head(self) -> Sequence:
        """The next to start; IndexError if nobody waits."""
        is_late = self._late and (not self._line or self._num_started >= _LATE_TURN - 1)
        return self._late[0] if is_late else self._line[0]

    def first(self, count: int) -> list[Sequence]:
        """Those who are next, the head before all others."""
        head = self.head
        others = [seq for seq in (*self._line[:count], *self._late[:count]) if seq is not head]
        return [head, *others][:count]

    def pass_time(self, now_s: float, token_s: float) -> None:
        """Let those that cannot be in time any more wait behind the others.

        Args:
            token_s: that each token of a prompt takes to compute.
        """
        for seq in self._line[:_LOOK_AHEAD] if self._by_deadline else ():
            if self._urgency(seq)[0] < now_s + seq.num_lacking * token_s:
                self._line.remove(seq)
                insort(self._late, seq, key=self._urgency)

    def add(self, seq: Sequence) -> None:
        """Let a sequence wait, at the place that its deadline gives it."""
        insort(self._line, seq, key=self._urgency)
        match = self._pool.match(seq.chain, seq.tokens, seq.num_known, NO_DRAFT)
        seq.num_lacking = seq.num_tokens
        if match is not None:
            seq.wants = match.slot
            seq.num_lacking -= match.num_tokens
            self._pool.prefixes.want(match.slot, seq.request_id, self._urgency(seq))
        if self._pool.host_prefixes is not None:
            known = match.num_tokens if match is not None else 0
            seq.num_lacking -= self._pool.host_prefixes.num_found(seq.chain, seq.num_known, known)
        self.num_lacking_tokens += seq.num_lacking

    def remove(self, seq: Sequence) -> None:
        """It starts, or has ended."""
        if seq in self._late:
            self._late.remove(seq)
        else:
            self._line.remove(seq)
        self.num_lacking_tokens -= seq.num_lacking
        if seq.wants is not None:
            self._pool.prefixes.unwant(seq.wants, seq.request_id)
            seq.wants = None

    def started(self, seq: Sequence) -> None:
        """It is not waiting any more: it runs."""
        self._num_started = 0 if seq in self._late else self._num_started + 1
        self.remove(seq)

    def _urgency(self, seq: Sequence) -> tuple[float, str]:
        due_s = seq.arrival_s + seq.request.priority * _PRIORITY_S
        return due_s + (seq.ttft_slo_s if self._by_deadline else 0.0), seq.request_id
