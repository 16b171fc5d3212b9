"""How many prompt tokens a step takes while sequences decode. Owns nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence as Sequences
from typing import NamedTuple

from engine.config import SchedulerConfig
from engine.sequence import Sequence
from engine.step_times import StepTimes, StepWork
from engine.waiting import WaitingLine

# A step that reads the weights anyway has time to compute so many tokens: 266 in bf16 on an H100 (798 TFLOP/s
# over 3.0 TB/s), 160 to 320 on other GPUs. Decodes need some of it, prompts may have the rest.
_TOKENS_OF_A_READ = 256
# Prompt tokens a step takes at least. Fewer would leave it waiting for weights; and it is the longest piece
# that an 8B model has a CUDA graph for.
_LEAST = 2 * _TOKENS_OF_A_READ
# Prompt tokens that a device computes as fast as any more of them: products of 1,024, 2,048, 4,096 and 8,192
# rows ran at 651, 660, 663 and 670 TFLOP/s, attention over 64,000 tokens at 607, 611, 613 and 615 (H200, 8B
# model).
_ENOUGH = 2048
# Seconds that a step beside decodes is worth, whatever pace they are promised. After longer ones, decodes
# that could have gone on are left over when no prompt shares the read of the weights any more: beside six
# prompts of 126,000 tokens steps of 4,096 left 251 steps of decodes alone (H200). But 4,096 tokens of short
# prompts take 80 ms, and there a step's own cost counts: 256 requests of 512 + 256 lost 1 % by such a limit.
_LONG_S = 0.2
_SHARE_OF_FIRST = 4  # a prompt by itself is spread over a quarter of the steps
_AIM = 0.75  # of the time to the first token that is promised: the rest is for what nobody foresees
_URGENT = 32  # waiting requests whose deadlines are looked at


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
    is due soon is not spread: LayerKV lets prompts in as fast as the sequences that run can bear it. But no
    prompt gains by steps that are longer than both the device and the promise of next tokens ask for, and
    nothing does by steps of more than `_LONG_S`.

    Args:
        config: `max_num_batched_tokens`, `prefill_spread_steps` and `policy`: only with `slo` do promises
            count.
        times: of steps.
    """

    def __init__(self, config: SchedulerConfig, times: StepTimes) -> None:
        self._most = config.max_num_batched_tokens
        self._spread_steps = config.prefill_spread_steps
        self._keeps_promises = config.policy == "slo"
        self._times = times

    def prompt_tokens(
        self, running: Sequences[Sequence], backlog: Backlog, bearable_s: float, share: float = 1.0
    ) -> int:
        """Tokens that the next step may compute of prompts, beside the sequences that decode.

        Args:
            share: of the largest step, if somebody decodes.
            bearable_s: how long a step may be for the sequences that decode; deadlines of prompts do not make
                it longer.
        """
        most = self._most - len(running)
        if running:
            most = max(min(most, _LEAST), int(min(most * share, self._promised(running, backlog))))
        steps = self._spread_steps * (1 - len(running) / _TOKENS_OF_A_READ)
        if steps <= 1:
            return most
        spread = max(_LEAST, backlog.tokens / steps, backlog.first * _SHARE_OF_FIRST / steps)
        return math.ceil(min(most, max(spread, self._hurried(running, backlog, bearable_s))))

    def _promised(self, running: Sequences[Sequence], backlog: Backlog) -> float:
        """Prompt tokens beside which next tokens keep the pace they are promised and no step takes too long.

        Enough for the device if those are more.
        """
        if not self._keeps_promises or not self._times.is_fitted:
            return math.inf
        step_s, token_s = self._seconds(running, backlog)
        promised_s = min(_LONG_S, *[seq.tpot_slo_s for seq in running])
        return max(_ENOUGH, (promised_s - step_s) / token_s) if token_s else math.inf

    def _seconds(self, running: Sequences[Sequence], backlog: Backlog) -> tuple[float, float]:
        """Predicted of a step of these decodes alone, and of each token of the first prompt beside them."""
        context = sum([seq.num_computed for seq in running])
        step_s = self._times.predict(StepWork(0, len(running), context))
        return step_s, self._times.per_prompt_token(backlog.first / 2)

    def _hurried(self, running: Sequences[Sequence], backlog: Backlog, bearable_s: float) -> float:
        """Tokens a step must compute of prompts so that each of them is in time, if that is bearable."""
        if not self._times.is_fitted or not backlog.due:
            return 0.0
        rate, lacking = 0.0, 0
        for tokens, due_s in backlog.due:
            lacking += tokens
            rate = max(rate, lacking / due_s if due_s > 0 else math.inf)
        step_s, token_s = self._seconds(running, backlog)
        if rate * token_s >= 1:
            wanted = math.inf
        else:
            wanted = rate * step_s / (1 - rate * token_s)
        bearable = (bearable_s - step_s) / token_s if token_s else math.inf
        return max(0.0, min(wanted, bearable))


def backlog_of(begun: Sequences[Sequence], waiting: WaitingLine | None, now_s: float | None) -> Backlog:
    """The prompts that could be computed now.

    Args:
        begun: in order of arrival.
        waiting: None if nobody waits, or for something else.
        now_s: None if deadlines are not looked at.
    """
    prompts = [(seq, seq.num_tokens - seq.num_computed) for seq in begun]
    first = begun[0].num_tokens - begun[0].num_found if begun else 0
    tokens = sum([lacks for _, lacks in prompts])
    if waiting:
        first = first or waiting.head.num_lacking
        tokens += waiting.num_lacking_tokens
        prompts += [(seq, seq.num_lacking) for seq in waiting.first(_URGENT)]
    if now_s is None:
        return Backlog(first, tokens)
    # Those that are late already would hurry everything for nothing.
    due = [
        (lacks, seq.arrival_s + _AIM * seq.ttft_slo_s - now_s)
        for seq, lacks in prompts
        if seq.arrival_s + seq.ttft_slo_s >= now_s
    ]
    return Backlog(first, tokens, sorted(due, key=lambda one: one[1]))
