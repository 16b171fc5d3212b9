"""From a request's text to the token ids of its prompts, off the event loop where that takes long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from cluster.api import ChatBody, CompletionBody, TokenizeBody, check_prompt, check_template_kwargs
from cluster.tokenizer import Tokenizer
from engine.errors import RequestError
from engine.messages import EngineInfo

# About a millisecond of tokenising; below it a thread's round trip costs more than it saves.
_INLINE_CHARS = 4096

TokenIds = tuple[int, ...]
T = TypeVar("T")


async def chat_prompt(body: ChatBody, tokenizer: Tokenizer, info: EngineInfo) -> TokenIds:
    """The conversation as one prompt. Raises RequestError."""

    def encode() -> list[int]:
        return _encode_chat(body, tokenizer, add_special_tokens=body.add_special_tokens)

    token_ids = tuple(await _run(encode, _num_chars(body.messages)))
    check_prompt(token_ids, info, "messages")
    return token_ids


async def completion_prompts(body: CompletionBody, tokenizer: Tokenizer, info: EngineInfo) -> list[TokenIds]:
    """Each prompt as token ids; those that came as token ids unchanged. Raises RequestError."""

    def encode() -> list[TokenIds]:
        return [
            tuple(tokenizer.encode(prompt, add_special_tokens=body.add_special_tokens))
            if isinstance(prompt, str)
            else tuple(prompt)
            for prompt in body.prompt
        ]

    prompts = await _run(encode, sum(map(len, body.prompt)))
    for token_ids in prompts:
        check_prompt(token_ids, info, "prompt")
    return prompts


async def tokenize(body: TokenizeBody, tokenizer: Tokenizer) -> list[int]:
    """What `/tokenize` asks for, of any length. Raises RequestError."""
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("give either prompt or messages", "prompt")
    check_template_kwargs(body.chat_template_kwargs)
    prompt, messages = body.prompt, body.messages

    def encode() -> list[int]:
        if prompt is not None:
            return tokenizer.encode(prompt, add_special_tokens=body.add_special_tokens is not False)
        return _encode_chat(body, tokenizer, add_special_tokens=bool(body.add_special_tokens))

    return await _run(encode, len(prompt or "") + _num_chars(messages or ()))


def _encode_chat(
    body: ChatBody | TokenizeBody, tokenizer: Tokenizer, *, add_special_tokens: bool
) -> list[int]:
    """Templates write the special tokens themselves, so none are added unless the client insists."""
    text = tokenizer.render_chat(
        body.messages or (),
        add_generation_prompt=body.add_generation_prompt,
        template_kwargs=body.chat_template_kwargs,
    )
    return tokenizer.encode(text, add_special_tokens=add_special_tokens)


def _num_chars(messages: Sequence[dict[str, str]]) -> int:
    return sum(len(message["content"]) for message in messages)


async def _run(work: Callable[[], T], num_chars: int) -> T:
    return work() if num_chars <= _INLINE_CHARS else await asyncio.to_thread(work)
