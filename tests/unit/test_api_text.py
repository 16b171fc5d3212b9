"""Text from tokens: detokenising and stop strings, however the tokens are grouped into deltas."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.text_stream import StopStrings, TextFinish, TextOptions, TextStream
from engine.messages import TokenDelta, TokenLogprobs
from tests.unit.ingress_fakes import END, START, byte_tokenizer

TOKENIZER = byte_tokenizer()


def play(
    tokens: list[int], cuts: list[int], options: TextOptions, finish: TextFinish = "length"
) -> tuple[str, int, str | None]:
    """(text, tokens, finish reason) of `tokens` cut into deltas at `cuts`."""
    stream = TextStream(TOKENIZER, options)
    edges = sorted({0, len(tokens), *(cut % (len(tokens) + 1) for cut in cuts)})
    text, num_tokens = "", 0
    for start, end in zip(edges, edges[1:], strict=False):
        is_last = end == len(tokens)
        gained = stream.push(
            TokenDelta("r", tuple(tokens[start:end]), finish_reason=finish if is_last else None)
        )
        text += gained.text
        num_tokens += gained.num_tokens
        if gained.finish_reason:
            return text, num_tokens, gained.finish_reason
    return text, num_tokens, None


def expected_text(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first; of several complete at once, the earliest."""
    for end in range(1, len(text) + 1):
        positions = [text.find(stop, 0, end) for stop in stops]
        found = [position for position in positions if position >= 0]
        if found:
            return text[: min(found)], True
    return text, False


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(alphabet="abcé🙂", min_size=1, max_size=24),
    stops=st.lists(st.text(alphabet="abcé🙂", min_size=1, max_size=5), max_size=3),
    cuts=st.lists(st.integers(0, 100), max_size=12),
)
def test_text_is_cut_at_the_first_stop_string_for_any_grouping(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    result, num_tokens, finish = play(list(text.encode()), cuts, TextOptions(stop=tuple(stops)))
    wanted, is_stopped = expected_text(text, stops)
    assert result == wanted
    assert finish == ("stop" if is_stopped else "length")
    assert num_tokens >= len(wanted.encode())
    if not is_stopped:
        assert num_tokens == len(text.encode())


@settings(max_examples=100, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 257), min_size=1, max_size=30),
    stops=st.lists(st.text(min_size=1, max_size=2), max_size=2),
    cuts=st.lists(st.integers(0, 100), max_size=12),
    min_tokens=st.integers(0, 5),
    skip=st.booleans(),
)
def test_any_bytes_give_the_same_text_for_any_grouping(
    tokens: list[int], stops: list[str], cuts: list[int], min_tokens: int, skip: bool
) -> None:
    options = TextOptions(tuple(stops), min_tokens, skip_special_tokens=skip)
    assert play(tokens, cuts, options) == play(tokens, [], options)
    if not stops:
        assert play(tokens, cuts, options)[0] == TOKENIZER.decode(tokens, skip_special_tokens=skip)


def test_stop_token_is_counted_but_is_no_text() -> None:
    options = TextOptions(skip_special_tokens=False)
    assert play([*b"hi", END], [1, 2], options, "stop") == ("hi", 3, "stop")
    assert play([END], [], options, "stop") == ("", 1, "stop")
    assert play([*b"hi!"], [], TextOptions(), "stop") == ("hi", 3, "stop")  # a stop token of the client's


def test_stop_is_left_in_the_text_on_request() -> None:
    options = TextOptions(stop=("lo",), include_stop=True, skip_special_tokens=False)
    assert play(list(b"hello you"), [4], options) == ("hello", 5, "stop")
    assert play([*b"hi", END], [], options, "stop") == ("hi<|end|>", 3, "stop")


def test_stop_strings_wait_for_min_tokens() -> None:
    assert play(list(b"aXbXc"), [1, 2], TextOptions(stop=("X",), min_tokens=3)) == ("aXb", 4, "stop")


def test_end_without_tokens_releases_what_was_held() -> None:
    stream = TextStream(TOKENIZER, TextOptions(stop=("END",)))
    assert stream.push(TokenDelta("r", tuple(b"the EN"))).text == "the "
    last = stream.push(TokenDelta("r", (), finish_reason="length"))
    assert (last.text, last.num_tokens, last.finish_reason) == ("EN", 0, "length")


def test_half_a_character_waits_and_becomes_a_replacement_at_the_end() -> None:
    stream = TextStream(TOKENIZER, TextOptions())
    euro = "€".encode()
    assert [stream.push(TokenDelta("r", (byte,))).text for byte in euro] == ["", "", "€"]
    assert stream.push(TokenDelta("r", tuple(euro[:2]), finish_reason="length")).text == "�"


def test_special_tokens_show_only_on_request() -> None:
    tokens = [*b"a", START, *b"b"]
    assert play(tokens, [], TextOptions())[0] == "ab"
    assert play(tokens, [2], TextOptions(skip_special_tokens=False))[0] == "a<|start|>b"


def test_log_probabilities_carry_their_place_in_the_text() -> None:
    stream = TextStream(TOKENIZER, TextOptions(stop=("d",)))
    tokens = (*"é".encode(), *b"bcde")
    gained = stream.push(TokenDelta("r", tokens, (TokenLogprobs(-1.0),) * len(tokens)))
    assert [(entry.token_id, entry.offset) for entry in gained.entries] == [
        (0xC3, 0),
        (0xA9, 0),
        (ord("b"), 1),
        (ord("c"), 2),
        (ord("d"), 3),
    ]
    assert (gained.text, gained.num_tokens) == ("ébc", 5)


@pytest.mark.parametrize(
    ("stops", "pieces", "released"),
    [
        (("\n\n",), ["a\n", "b\n", "\nc"], ["a", "\nb", ""]),
        (("aab",), ["aaa", "b"], ["a", ""]),
        (("abcd", "bc"), ["ab", "c"], ["", "a"]),
    ],
)
def test_what_could_begin_a_stop_string_is_held_back(
    stops: tuple[str, ...], pieces: list[str], released: list[str]
) -> None:
    matcher = StopStrings(stops)
    results = [matcher.push(piece) for piece in pieces]
    assert [text for text, _ in results] == released
    assert [found for _, found in results] == [False] * (len(pieces) - 1) + [True]
    assert matcher.flush() == ""
