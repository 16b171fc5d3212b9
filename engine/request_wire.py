"""A request as bytes, on its way from an ingress to an engine's door: data, so that nothing a stranger sends
is ever executed.

Frames: the engine's secret, what is wanted, and for `OPEN` the request's and the stream's facts in JSON and
the prompt as 32-bit integers of this machine's order. For `DROP` the request's id.
"""

from __future__ import annotations

import sys
from array import array
from dataclasses import dataclass, field, fields
from typing import Any

import orjson

from engine.errors import RequestError
from engine.messages import GenerateRequest, ReplyTo, SamplingParams

OPEN, DROP = b"open", b"drop"
_NUMBERS = "I"
_FACTS = [one.name for one in fields(GenerateRequest) if one.name not in ("prompt_token_ids", "sampling")]
_SAMPLING = [one.name for one in fields(SamplingParams)]


@dataclass(frozen=True, slots=True)
class EngineAddress:
    """Where an engine takes requests past Ray (`engine.request_door`).

    Attributes:
        address: ZMQ endpoint that the engine's process listens on.
        secret: what that process believes an ingress by; drawn anew by each process.
    """

    address: str
    secret: bytes = field(repr=False)


def encode_open(secret: bytes, request: GenerateRequest, reply_to: ReplyTo) -> tuple[bytes, ...]:
    """Frames that have a request begun."""
    facts = {
        "request": {name: getattr(request, name) for name in _FACTS},
        "sampling": {name: getattr(request.sampling, name) for name in _SAMPLING},
        "reply_to": [reply_to.address, reply_to.secret.hex(), reply_to.stream],
        "order": sys.byteorder,
    }
    return secret, OPEN, orjson.dumps(facts), array(_NUMBERS, request.prompt_token_ids).tobytes()


def encode_drop(secret: bytes, request_id: str) -> tuple[bytes, ...]:
    """Frames that end a request which no call has come for."""
    return secret, DROP, request_id.encode()


def decode_open(facts: bytes, prompt: bytes) -> tuple[GenerateRequest, ReplyTo]:
    """What `encode_open` was given. Raises ValueError for anything that it did not make."""
    try:
        told: dict[str, Any] = orjson.loads(facts)
        sampling = told["sampling"]
        sampling["logit_bias"] = tuple([(token_id, bias) for token_id, bias in sampling["logit_bias"]])
        sampling["stop_token_ids"] = tuple(sampling["stop_token_ids"])
        address, secret, stream = told["reply_to"]
        numbers = array(_NUMBERS, prompt)
        if told["order"] != sys.byteorder:
            numbers.byteswap()
        request = GenerateRequest(
            prompt_token_ids=tuple(numbers), sampling=SamplingParams(**sampling), **told["request"]
        )
        return request, ReplyTo(address, bytes.fromhex(secret), stream)
    except (KeyError, TypeError, AttributeError, RequestError) as error:
        raise ValueError(f"not a request: {error}") from error
