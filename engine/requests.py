"""What of a request cannot be done, or not in time, found before anything is queued."""

from __future__ import annotations

from engine.config import SloConfig
from engine.errors import OverloadedError, RequestError
from engine.messages import EngineInfo, GenerateRequest


def check_request(request: GenerateRequest, info: EngineInfo) -> None:
    """Refuse what the model cannot do.

    Raises:
        RequestError: names the parameter.
    """
    prompt, sampling = request.prompt_token_ids, request.sampling
    if not prompt:
        raise RequestError("the prompt is empty", "prompt")
    if min(prompt) < 0 or max(prompt) >= info.vocab_size:
        raise RequestError(f"the prompt has a token outside the vocabulary of {info.vocab_size}", "prompt")
    if len(prompt) + sampling.max_tokens > info.max_model_len:
        raise RequestError(
            f"this model's maximum context length is {info.max_model_len} tokens, and {len(prompt)} of "
            f"prompt and {sampling.max_tokens} of output were asked for",
            "max_tokens" if len(prompt) < info.max_model_len else "prompt",
            "context_length_exceeded",
        )
    for param, tokens in (
        ("logit_bias", [token for token, _ in sampling.logit_bias]),
        ("stop_token_ids", sampling.stop_token_ids),
    ):
        outside = [token for token in tokens if not 0 <= token < info.vocab_size]
        if outside:
            raise RequestError(
                f"{param} names token {outside[0]}, and the vocabulary has {info.vocab_size}", param
            )


def check_in_time(request: GenerateRequest, slo: SloConfig, expected_s: float) -> None:
    """Raise OverloadedError if a request's first token, expected in so many seconds, would come too late.

    It says when one like it would be in time, if nobody else came meanwhile.
    """
    promised_s = slo.ttft_ms / 1e3 if request.ttft_slo_s is None else request.ttft_slo_s
    if expected_s > promised_s:
        raise OverloadedError(
            f"the first token would take {expected_s:.1f} s, and {promised_s:.1f} s are promised",
            expected_s - promised_s,
        )
