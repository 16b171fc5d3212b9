"""Which promises to clients were kept, counted for those who divide memory among engines."""

from __future__ import annotations

from engine.sequence import Sequence


class Promises:
    """Counts since start.

    Attributes:
        first_in_time, first_late: first tokens.
        paced_in_time, paced_late: answers in full, by their mean time per token after the first.
    """

    def __init__(self) -> None:
        self.first_in_time = self.first_late = 0
        self.paced_in_time = self.paced_late = 0

    def first_token(self, seq: Sequence, now_s: float) -> None:
        """A sequence has its first token."""
        if now_s - seq.arrival_s <= seq.ttft_slo_s:
            self.first_in_time += 1
        else:
            self.first_late += 1

    def ended(self, seq: Sequence, now_s: float) -> None:
        """A request was answered in full."""
        if seq.first_token_s is None:
            return
        if now_s - seq.first_token_s <= seq.tpot_slo_s * max(0, len(seq.output_token_ids) - 1):
            self.paced_in_time += 1
        else:
            self.paced_late += 1
