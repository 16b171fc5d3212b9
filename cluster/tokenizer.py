"""Text to token ids and back: prompts, chat templates and incremental detokenisation.

Knows no files (`cluster.tokenizer_files` reads them) and no stop strings (`cluster.text_stream`).
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer as Backend
from transformers.utils.chat_template_utils import render_jinja_template

from cluster.tokenizer_files import TokenizerFiles, read_tokenizer
from engine.errors import RequestError

# What a template may raise for messages it was not written for, besides its own refusals.
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)

_SPACE_MARK = "\u2581"  # how sentencepiece writes a space


class Tokenizer:
    """One model's tokenizer. Safe to share between threads."""

    def __init__(self, files: TokenizerFiles) -> None:
        self._backend = files.backend
        self._template = files.chat_template
        self._special = dict(files.special_tokens)
        self._pieces = _Pieces(files.backend)
        # A tokenizer.json may carry the settings of its training; a server never cuts or pads.
        self._backend.no_truncation()
        self._backend.no_padding()

    @classmethod
    def load(cls, source: str) -> Tokenizer:
        """Read the tokenizer of a directory, a `.gguf` file or a hub id; takes seconds.

        Raises:
            ModelLoadError: there is none.
        """
        return cls(read_tokenizer(source))

    @property
    def vocab_size(self) -> int:
        """Token ids the tokenizer knows; the model's own vocabulary may be padded beyond."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, by default with what the model wants around it, such as a first BOS."""
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """`messages` as the model's chat template writes them.

        Raises:
            RequestError: the model has no template, or the template refuses the messages.
        """
        if self._template is None:
            raise RequestError(
                "this model has no chat template; use /v1/completions with a prompt of your own", "messages"
            )
        variables = {**(template_kwargs or {}), **self._special}
        try:
            rendered, _ = render_jinja_template(
                [list(messages)],
                chat_template=self._template,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except _TEMPLATE_ERRORS as error:
            raise RequestError(
                f"the model's chat template refused the messages: {error}", "messages"
            ) from error
        return str(rendered[0])

    def token_text(self, token_id: int) -> str:
        """The text of one token alone, special tokens included; a part of a character is U+FFFD."""
        return self._pieces.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, also where they are only a part of a character."""
        return self._pieces.token_bytes(token_id)

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """A fresh incremental detokeniser for one sequence."""
        return Detokenizer(self._pieces, skip_special_tokens)


class Detokenizer:
    """Turns one sequence's tokens into text as they come.

    Text is given out only when it is final: half a character waits for its other half. Works on bytes,
    because the library's own stream raises for byte tokens that are no UTF-8, which models do emit. A
    space at the very beginning stays: the text continues a prompt.
    """

    def __init__(self, pieces: _Pieces, skip_special_tokens: bool) -> None:
        self._pieces = pieces
        self._skipped_ids = pieces.special_ids if skip_special_tokens else frozenset[int]()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that `token_ids` make final; may be empty. Ids that are no tokens have no text."""
        token_bytes = self._pieces.token_bytes
        return self._utf8.decode(
            b"".join([token_bytes(token) for token in token_ids if token not in self._skipped_ids])
        )

    def flush(self) -> str:
        """What still waits, at the end of the sequence: bytes that became no character, as U+FFFD."""
        return self._utf8.decode(b"", final=True)


class _Pieces:
    """The bytes of each token: a vocabulary spells them in one of three ways.

    Byte-level vocabularies write every byte as one character. Sentencepiece ones write text, with a
    mark for the space, and bytes as `<0x0A>`. Added tokens stand for themselves in both.
    """

    def __init__(self, backend: Backend) -> None:
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._added_ids = frozenset(added)
        self._backend = backend
        self._alphabet = _byte_level_alphabet() if "ByteLevel" in repr(backend.decoder) else {}
        self._known: dict[int, bytes] = {}

    def token_bytes(self, token_id: int) -> bytes:
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._spell(token_id)
        return known

    def _spell(self, token_id: int) -> bytes:
        piece = self._backend.id_to_token(token_id) or ""
        if token_id in self._added_ids:
            return piece.encode()
        if self._alphabet:
            known = self._alphabet.keys() >= set(piece)
            return bytes(self._alphabet[char] for char in piece) if known else piece.encode()
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE_MARK, " ").encode()


def _byte_level_alphabet() -> dict[str, int]:
    """The printable character that byte-level vocabularies write for each byte, reversed.

    Printable bytes stand for themselves; the others take the code points from 256 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
