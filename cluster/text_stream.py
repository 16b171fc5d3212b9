"""One choice's tokens as text: incremental detokenisation and stop strings. Pure, no I/O.

The engine knows no text, so stop strings end here. The text does not depend on how the tokens were
grouped into deltas: everything is decided token by token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cluster.tokenizer import Tokenizer
from engine.messages import TokenDelta, TokenLogprobs

TextFinish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How a request wants its tokens turned into text.

    Attributes:
        stop: strings that end the text; none is empty.
        min_tokens: tokens before which no stop string ends the text.
        include_stop: leave the stop string, or the stop token's text, in the text.
    """

    stop: tuple[str, ...] = ()
    min_tokens: int = 0
    skip_special_tokens: bool = True
    include_stop: bool = False


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """One token for a logprobs report.

    Attributes:
        offset: characters of generated text before this token.
    """

    token_id: int
    logprobs: TokenLogprobs
    offset: int


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What one delta of tokens adds to the text.

    Attributes:
        num_tokens: tokens that count as generated, stop tokens included.
        entries: one a token of the text if logprobs were asked for. Text may lag behind its entries
            while it could be the beginning of a stop string.
    """

    text: str
    num_tokens: int
    entries: tuple[TokenEntry, ...] = ()
    finish_reason: TextFinish | None = None

    @property
    def is_empty(self) -> bool:
        """Nothing in it that a client should hear of."""
        return not (self.text or self.entries or self.finish_reason)


class TextStream:
    """The text of one choice. After a delta with a finish reason it takes no more."""

    def __init__(self, tokenizer: Tokenizer, options: TextOptions) -> None:
        self._options = options
        self._detokenizer = tokenizer.detokenizer(skip_special_tokens=options.skip_special_tokens)
        self._stops = StopStrings(options.stop, options.include_stop)
        self._num_tokens = 0
        self._num_chars = 0

    def push(self, delta: TokenDelta) -> TextDelta:
        """The text that `delta` adds; its `finish_reason` must be `stop`, `length` or None."""
        finish: TextFinish | None = delta.finish_reason  # type: ignore[assignment]
        hides_last = finish == "stop" and not self._options.include_stop
        visible = delta.token_ids[:-1] if hides_last else delta.token_ids
        texts: list[str] = []
        entries: list[TokenEntry] = []
        for index, token_id in enumerate(visible):
            if delta.logprobs:
                entries.append(TokenEntry(token_id, delta.logprobs[index], self._num_chars))
            text, found = self._take(token_id)
            texts.append(text)
            if found:
                return TextDelta("".join(texts), index + 1, tuple(entries), "stop")
        if finish is not None:
            texts.append(self._stops.push(self._detokenizer.flush())[0] + self._stops.flush())
        return TextDelta("".join(texts), len(delta.token_ids), tuple(entries), finish)

    def _take(self, token_id: int) -> tuple[str, bool]:
        """The text one token releases, and whether a stop string ends there."""
        self._num_tokens += 1
        piece = self._detokenizer.push((token_id,))
        self._num_chars += len(piece)
        if self._num_tokens < self._options.min_tokens:
            return piece, False
        return self._stops.push(piece)


class StopStrings:
    """Cuts a text at the first stop string, holding back what could be the beginning of one."""

    def __init__(self, stop: tuple[str, ...], include_stop: bool = False) -> None:
        self._stop = stop
        self._include_stop = include_stop
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text now known to be free of stop strings, and whether one was found after it."""
        if not self._stop:
            return text, False
        held = self._held + text
        found = [(position, stop) for stop in self._stop if (position := held.find(stop)) >= 0]
        if found:
            position, stop = min(found, key=lambda match: (match[0], -len(match[1])))
            self._held = ""
            return held[: position + len(stop) * self._include_stop], True
        keep = self._longest_beginning(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def flush(self) -> str:
        """What is held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _longest_beginning(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = max(map(len, self._stop)) - 1
        for length in range(min(longest, len(text)), 0, -1):
            end = text[len(text) - length :]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0
