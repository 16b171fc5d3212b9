"""How many prompt tokens a step takes while sequences decode. Owns nothing but what it learns of step times."""

from __future__ import annotations

import math
from collections.abc import Sequence as Sequences
from typing import NamedTuple

from engine.config import SchedulerConfig
from engine.sequence import Sequence
from engine.step_times import StepTimes, StepWork

# A step that reads the weights anyway has time to compute so many tokens: 266 in bf16 on an H100 (798 TFLOP/s
# over 3.0 TB/s), 160 to 320 on other GPUs. Decodes need some of it, prompts may have the rest.
_TOKENS_OF_A_READ = 256
# Prompt tokens a step takes at least. Fewer would leave it waiting for weights; and it is the longest piece
# that an 8B model has a CUDA graph for.
_LEAST = 2 * _TOKENS_OF_A_READ
_SHARE_OF_FIRST = 4  # a prompt by itself is spread over a quarter of the steps
_AIM = 0.5  # of the time to the first token that is promised: the rest is for what nobody foresees


class Backlog(NamedTuple):
    """Prompt tokens to compute, and when.

    Attributes:
        first: tokens of the prompt that is first.
        tokens: of all.
        due: (tokens, time) of each in the order of their deadlines: how many it lacks, and when its first
            token should be there, as seconds from now.
    """

    first: int
    tokens: int
    due: Sequences[tuple[int, float]] = ()


class Pace:
    """Spreads prompts over steps, so that decodes go on beside them, as long as first tokens allow it.

    A step of decodes alone mostly waits for the weights, so prompt tokens beside decodes are cheaper than a
    step of their own; and nobody's next token waits for a whole prompt. The more decodes, the less there is
    to gain, and the fewer steps are taken: at 256 one, since their products take as long as the read. What
    is due soon is not spread: LayerKV lets prompts in as fast as the sequences that run can bear it.

    Args:
        config: `max_num_batched_tokens` and `prefill_spread_steps`.
        times: of steps.
    """

    def __init__(self, config: SchedulerConfig, times: StepTimes) -> None:
        self._most = config.max_num_batched_tokens
        self._spread_steps = config.prefill_spread_steps
        self._times = times

    def prompt_tokens(self, running: Sequences[Sequence], backlog: Backlog, bearable_s: float) -> int:
        """Tokens that the next step may compute of prompts, beside the sequences that decode.

        Args:
            bearable_s: how long a step may be for the sequences that decode; deadlines of prompts do not make
                it longer.
        """
        most = self._most - len(running)
        steps = self._spread_steps * (1 - len(running) / _TOKENS_OF_A_READ)
        if steps <= 1:
            return most
        spread = max(_LEAST, backlog.tokens / steps, backlog.first * _SHARE_OF_FIRST / steps)
        return math.ceil(min(most, max(spread, self._hurried(running, backlog, bearable_s))))

    def _hurried(self, running: Sequences[Sequence], backlog: Backlog, bearable_s: float) -> float:
        """Tokens a step must compute of prompts so that each of them is in time, if that is bearable."""
        if not self._times.is_fitted or not backlog.due:
            return 0.0
        rate, lacking = 0.0, 0
        for tokens, due_s in backlog.due:
            lacking += tokens
            rate = max(rate, lacking / due_s if due_s > 0 else math.inf)
        token_s = self._times.per_prompt_token(backlog.first / 2)
        context = sum([seq.num_computed for seq in running])
        step_s = self._times.predict(StepWork(0, len(running), context))
        if rate * token_s >= 1:
            wanted = math.inf
        else:
            wanted = rate * step_s / (1 - rate * token_s)
        bearable = (bearable_s - step_s) / token_s if token_s else math.inf
        return max(0.0, min(wanted, bearable))


def due_in_s(seq: Sequence, now_s: float) -> float:
    """Seconds until the first token of a prompt should be there."""
    return seq.arrival_s + _AIM * seq.ttft_slo_s - now_s
