"""The request bodies of the OpenAI-compatible API, and what they mean to an engine.

Ranges of sampling parameters are checked by `SamplingParams`; here stand only the facts of the API:
names, shapes, and what depends on the model (vocabulary, context length).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated

from pydantic import BeforeValidator, Field, JsonValue

from cluster.api_body import Body
from cluster.api_inputs import MAX_SEQUENCES, read_messages, read_prompts, read_stop
from cluster.text_stream import TextOptions
from engine.errors import RequestError
from engine.messages import MAX_LOGPROBS, EngineInfo, SamplingParams

MAX_CHOICES = 32  # n of one prompt
MAX_PRIORITY = 1000  # in both directions
_DEFAULT_COMPLETION_TOKENS = 16
# Arguments of the renderer, which would otherwise be reachable from a request.
_RESERVED_TEMPLATE_NAMES = frozenset(
    ("messages", "add_generation_prompt", "chat_template", "conversations", "tools", "documents")
    + ("continue_final_message", "return_assistant_tokens_mask")
)


class StreamOptions(Body):
    """What a stream carries besides tokens."""

    include_usage: bool = False
    include_obfuscation: bool = False  # padding against traffic analysis: accepted, never added


class GenerationBody(Body):
    """Fields that chat and plain completions share. Meanings are OpenAI's, else vLLM's."""

    model: str
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    best_of: int | None = None
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[str, float] = {}
    stop: Annotated[list[str], BeforeValidator(read_stop)] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    min_tokens: int = 0
    stream: bool = False
    stream_options: StreamOptions | None = None
    cache_salt: str | None = Field(None, min_length=1)
    priority: int = Field(0, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Alternatives to report a token; None for no logprobs at all."""

    def requested_max_tokens(self) -> int | None:
        """The client's own limit, if it gave one."""
        return self.max_tokens

    def check(self) -> None:
        """Raise RequestError for fields that contradict each other."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream to be true", "stream_options")
        if self.best_of is not None and self.best_of != self.n:
            raise RequestError("best_of is not supported by this server unless it equals n", "best_of")
        if self.top_k < -1:
            raise RequestError(f"top_k must be -1 or 0 (off) or more, not {self.top_k}", "top_k")

    def text_options(self) -> TextOptions:
        """What concerns the text alone."""
        return TextOptions(
            stop=tuple(self.stop),
            min_tokens=self.min_tokens,
            skip_special_tokens=self.skip_special_tokens,
            include_stop=self.include_stop_str_in_output,
        )

    def sampling(self, max_tokens: int, vocab_size: int, choice: int) -> SamplingParams:
        """What concerns the engine, for one of the `n` choices: each has a seed of its own.

        Raises:
            RequestError: a value out of range.
        """
        _check_token_ids(self.stop_token_ids, vocab_size, "stop_token_ids")
        seed = self.seed
        if seed is not None and -(2**63) <= seed < 2**63:
            seed = (seed + choice + 2**63) % 2**64 - 2**63
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            seed=seed,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=_logit_bias(self.logit_bias, vocab_size),
            logprobs=self.num_logprobs(),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
        )


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, str]], BeforeValidator(read_messages)]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool = True
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, JsonValue] = {}

    def requested_max_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    def check(self) -> None:
        super().check()
        check_template_kwargs(self.chat_template_kwargs)
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise RequestError("max_tokens and max_completion_tokens contradict each other", "max_tokens")


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(read_prompts)]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False
    add_special_tokens: bool = True

    def num_logprobs(self) -> int | None:
        return self.logprobs

    def check(self) -> None:
        super().check()
        if len(self.prompt) * self.n > MAX_SEQUENCES:
            raise RequestError(f"prompts times n must be at most {MAX_SEQUENCES}", "prompt")
        if self.echo and self.logprobs is not None:
            raise RequestError("logprobs together with echo is not supported by this server", "logprobs")


class TokenizeBody(Body):
    """POST /tokenize: either a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, str]], BeforeValidator(read_messages)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, JsonValue] = {}
    return_token_strs: bool = False


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


class TrimBody(Body):
    """POST /trim: all models unless one is named."""

    model: str | None = None
    drop_cache: bool = False


def check_prompt(token_ids: Sequence[int], info: EngineInfo, param: str) -> None:
    """Raise RequestError if an engine could not take these token ids as a prompt."""
    if not token_ids:
        raise RequestError(f"{param} must hold at least one token", param)
    _check_token_ids(token_ids, info.vocab_size, param)
    if len(token_ids) >= info.max_model_len:
        raise RequestError(
            f"this model's maximum context length is {info.max_model_len} tokens, of which at least one "
            f"is for the output; the {param} alone has {len(token_ids)}",
            param,
            "context_length_exceeded",
        )


def resolve_max_tokens(body: GenerationBody, num_prompt_tokens: int, info: EngineInfo) -> int:
    """Tokens to generate at most.

    Without a limit of the client's, a chat may fill the context and a plain completion gets 16 tokens.

    Raises:
        RequestError: the prompt and the client's limit do not fit into the context together.
    """
    remaining = info.max_model_len - num_prompt_tokens
    requested = body.requested_max_tokens()
    if requested is None:
        return remaining if isinstance(body, ChatBody) else min(_DEFAULT_COMPLETION_TOKENS, remaining)
    if requested > remaining:
        raise RequestError(
            f"this model's maximum context length is {info.max_model_len} tokens, but {num_prompt_tokens} "
            f"tokens of prompt and {requested} of output were asked for; shorten the prompt or "
            f"lower max_tokens to {remaining}",
            "max_tokens",
            "context_length_exceeded",
        )
    return requested


def check_template_kwargs(template_kwargs: dict[str, JsonValue]) -> None:
    """Raise RequestError if extra template variables would replace the server's own."""
    for name in _RESERVED_TEMPLATE_NAMES & template_kwargs.keys():
        raise RequestError(f"chat_template_kwargs must not set {name}", "chat_template_kwargs")


def _logit_bias(bias: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    try:
        pairs = tuple((int(token), value) for token, value in bias.items())
    except ValueError as error:
        raise RequestError("the keys of logit_bias must be token ids", "logit_bias") from error
    _check_token_ids([token for token, _ in pairs], vocab_size, "logit_bias")
    return pairs


def _check_token_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        worst = next(token for token in token_ids if not 0 <= token < vocab_size)
        raise RequestError(
            f"{param}: token id {worst} is not in the vocabulary (0 to {vocab_size - 1})",
            param,
            "invalid_token_id",
        )
