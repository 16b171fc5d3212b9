"""How many prompt tokens a step takes while sequences decode. Owns nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable

from engine.config import SchedulerConfig
from engine.sequence import Sequence

# A step that reads the weights anyway has time to compute so many tokens: 266 in bf16 on an H100 (798 TFLOP/s
# over 3.0 TB/s), 160 to 320 on other GPUs. Decodes need some of it, prompts may have the rest.
_TOKENS_OF_A_READ = 256
# Prompt tokens a step takes at least. Fewer would leave it waiting for weights; and it is the longest piece
# that an 8B model has a CUDA graph for.
_LEAST = 2 * _TOKENS_OF_A_READ
_SHARE_OF_FIRST = 4  # a prompt by itself is spread over a quarter of the steps


class Pace:
    """Spreads prompts over steps, so that decodes go on beside them.

    A step of decodes alone mostly waits for the weights, so prompt tokens beside decodes are cheaper than a
    step of their own; and nobody's next token waits for a whole prompt. The more decodes, the less there is
    to gain, and the fewer steps are taken: at 256 one, since their products take as long as the read.

    Args:
        config: `max_num_batched_tokens` and `prefill_spread_steps`.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._most = config.max_num_batched_tokens
        self._spread_steps = config.prefill_spread_steps

    def prompt_tokens(
        self, num_decodes: int, prompts: Iterable[Sequence], next_lacks: int, waiting_lack: int
    ) -> int:
        """Tokens that the next step may compute of prompts, beside so many decodes.

        Args:
            prompts: that have begun, in order of arrival.
            next_lacks, waiting_lack: tokens to compute of the first request that waits for a place in a step,
                and of all of them; 0 if none does.
        """
        most = self._most - num_decodes
        steps = self._spread_steps * (1 - num_decodes / _TOKENS_OF_A_READ)
        if steps <= 1:
            return most
        first, backlog = 0, waiting_lack
        for seq in prompts:
            first = first or seq.num_tokens - seq.num_found
            backlog += seq.num_tokens - seq.num_computed
        tokens = max(_LEAST, backlog / steps, (first or next_lacks) * _SHARE_OF_FIRST / steps)
        return min(most, math.ceil(tokens))
