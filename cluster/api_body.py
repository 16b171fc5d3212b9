"""Reads JSON bodies strictly: every field is served, refused by name, or known to change nothing.

A parameter that is silently ignored is worse than an error, so a field this server does not implement
is accepted only with the value that means "off".
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from engine.errors import RequestError

# Fields of OpenAI's and vLLM's APIs that are not served, with the values (besides null) that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "chat_template": (),
    "chat_template_content_format": ("auto", "string"),
    "continue_final_message": (False,),
    "documents": ([],),
    "early_stopping": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "grammar": (),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "images": ([],),
    "include_reasoning": (True, False),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "lora_name": (),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "reasoning": (),
    "reasoning_effort": ("none",),
    "repetition_detection": (),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_a": (0,),
    "truncate_prompt_tokens": (),
    "typical_p": (1, 1.0),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "vllm_xargs": (),
    "web_search_options": (),
}
# Fields about the client's bookkeeping that do not touch the answer.
_HARMLESS: dict[str, tuple[Any, ...] | None] = {
    "metadata": None,
    "prompt_cache_key": None,
    "prompt_cache_retention": None,
    "safety_identifier": None,
    "service_tier": ("auto", "default"),
    "store": (False,),
    "user": None,
}


class Body(BaseModel):
    """Base of all request bodies. Values keep their JSON type: "1" is not a number here."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


BodyT = TypeVar("BodyT", bound=Body)


def parse_body(raw: bytes, body_type: type[BodyT]) -> BodyT:
    """`raw` JSON as a request.

    Raises:
        RequestError: not JSON, not an object, an unknown or unsupported field, or a wrong type.
    """
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the request body is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise RequestError("the request body must be a JSON object")
    fields = {name: value for name, value in data.items() if _is_field(name, value, body_type)}
    try:
        return body_type.model_validate(fields)
    except ValidationError as error:
        raise _as_request_error(error) from error


def refuse_unless_neutral(name: str, value: Any, neutral: tuple[Any, ...]) -> None:
    """Raise RequestError if `value` asks for something; null never does."""
    if value is None or any(type(value) is type(off) and value == off for off in neutral):
        return
    instead = f"; leave it out or set it to {_as_json(neutral[0])}" if neutral else ""
    raise RequestError(f"{name} is not supported by this server{instead}", name, "unsupported_parameter")


def _is_field(name: str, value: Any, body_type: type[Body]) -> bool:
    """Whether the request type takes this field; a null means the field's default everywhere."""
    if name in body_type.model_fields:
        return value is not None
    if name in _UNSUPPORTED:
        refuse_unless_neutral(name, value, _UNSUPPORTED[name])
        return False
    if name in _HARMLESS:
        accepted = _HARMLESS[name]
        if accepted is not None:
            refuse_unless_neutral(name, value, accepted)
        return False
    name = name[:64]
    nearest = get_close_matches(name, [*body_type.model_fields, *_HARMLESS], n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise RequestError(f"unknown parameter {name!r}{hint}", name, "unknown_parameter")


def _as_request_error(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_input=False)[0]
    path = ""
    for part in first["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    if first["type"] == "missing":
        return RequestError(f"{path} is required", path, "missing_required_parameter")
    return RequestError(f"{path}: {first['msg']}", path, "invalid_type")


def _as_json(value: Any) -> str:
    return orjson.dumps(value).decode()
