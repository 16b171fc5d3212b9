"""Tokenizers from files, and text from their tokens."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from cluster.gguf_metadata import read_metadata
from cluster.tokenizer import Tokenizer
from cluster.tokenizer_files import TokenizerFiles
from engine.errors import ModelLoadError, RequestError
from tests.unit.ingress_fakes import END, byte_tokenizer

MESSAGES = [{"role": "user", "content": "Hello"}]


def sentencepiece_like() -> Tokenizer:
    """Pieces with a space mark and a fallback to bytes, as Llama 2 and Mistral have them."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "b", "é", "▁▁"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("<unk>"), AddedToken("<s>")])
    return Tokenizer(TokenizerFiles(backend, None, {}))


SPM = sentencepiece_like()
BYTES = byte_tokenizer()


def write_model(directory: Path, config: dict[str, object], *, truncate: bool = False) -> Path:
    backend = Backend(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "<s>": 3}, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if truncate:
        backend.enable_truncation(1)
        backend.enable_padding(length=5)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, END + 5), max_size=30), st.booleans())
def test_streamed_text_is_the_decoded_text(tokens: list[int], skip: bool) -> None:
    detokenizer = BYTES.detokenizer(skip_special_tokens=skip)
    text = "".join([detokenizer.push([token]) for token in tokens]) + detokenizer.flush()
    assert text == BYTES.decode(tokens, skip_special_tokens=skip)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 262), max_size=30))
def test_bytes_that_are_no_utf8_never_break_a_stream(tokens: list[int]) -> None:
    detokenizer = SPM.detokenizer()
    text = "".join([detokenizer.push([token]) for token in tokens]) + detokenizer.flush()
    raw = b"".join(SPM.token_bytes(token) for token in tokens if token > 1)
    assert text == raw.decode(errors="replace")
    if "�" not in text:
        assert text.removeprefix(" ") == SPM.decode(tokens)  # the library drops a first space


def test_sentencepiece_text_keeps_its_first_space() -> None:
    detokenizer = SPM.detokenizer()
    space_a, euro = 259, [2 + byte for byte in "€".encode()]
    assert [detokenizer.push([token]) for token in (space_a, *euro, 260)] == [" a", "", "", "€", "b"]
    assert SPM.token_text(space_a) == " a"


def test_directory(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    config = {"bos_token": {"content": "<s>"}, "chat_template": template}
    tokenizer = Tokenizer.load(str(write_model(tmp_path, config, truncate=True)))
    assert tokenizer.encode("abab") == [2, 2]  # neither cut nor padded
    assert tokenizer.render_chat(MESSAGES) == "<s>Hello"
    assert tokenizer.vocab_size == 4


@pytest.mark.parametrize("where", ["jinja", "json", "named"])
def test_chat_templates_have_several_homes(tmp_path: Path, where: str) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    write_model(tmp_path, {"chat_template": named if where == "named" else "old"})
    if where == "jinja":
        (tmp_path / "chat_template.jinja").write_text("D")
    if where == "json":
        (tmp_path / "chat_template.json").write_text('{"chat_template": "D"}')
    assert Tokenizer.load(str(tmp_path)).render_chat(MESSAGES) == "D"


def test_what_is_no_tokenizer_is_told(tmp_path: Path) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "tokenizer.json").write_text("{}")
    (tmp_path / "not.gguf").write_bytes(b"GGUF or not")
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "none-inside.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 0))
    (tmp_path / "short.gguf").write_bytes(struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 2**60))
    for source, message in (
        (str(tmp_path / "none"), "no such directory"),
        (str(tmp_path / "none.gguf"), "no such file"),
        (str(tmp_path / "damaged"), "cannot be read"),
        (str(tmp_path / "not.gguf"), "not a readable GGUF"),
        (str(tmp_path / "empty.gguf"), "not a readable GGUF"),
        (str(tmp_path / "short.gguf"), "not a readable GGUF"),
        (str(tmp_path / "none-inside.gguf"), "set tokenizer_source"),
        ("not a hub id", "neither a directory nor"),
    ):
        with pytest.raises(ModelLoadError, match=message):
            Tokenizer.load(source)


def test_templates_cannot_leave_their_sandbox() -> None:
    tokenizer = byte_tokenizer("{{ messages.__class__.__mro__ }}")
    with pytest.raises(RequestError, match="refused the messages"):
        tokenizer.render_chat(MESSAGES)


@pytest.mark.model
def test_demo_model(demo_model_path: Path) -> None:
    tokenizer = Tokenizer.load(str(demo_model_path))
    # As transformers' own reader of this file encodes it (checked with transformers 5.23).
    assert tokenizer.encode("hello  wörld 123 <|im_end|>") == [
        28120,
        216,
        267,
        29989,
        400,
        216,
        33,
        34,
        35,
        216,
        2,
    ]
    assert tokenizer.render_chat([{"role": "system", "content": "s"}, *MESSAGES]) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    text = "日本語 🙂👩‍👩‍👧 naïve\n\tx  1234"
    token_ids = tokenizer.encode(text)
    detokenizer = tokenizer.detokenizer()
    assert "".join([detokenizer.push([token]) for token in token_ids]) == text
    assert b"".join(map(tokenizer.token_bytes, token_ids)) == text.encode()
    assert tokenizer.vocab_size == 49152


def test_gguf_metadata_of_every_type(tmp_path: Path) -> None:
    path = tmp_path / "all.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("a.u8", 255)
    writer.add_int64("a.i64", -(2**40))
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "é🙂")
    writer.add_array("a.ints", [1, -2])
    writer.add_array("a.texts", ["x", ""])
    writer.add_array("a.nested", [[1, 2], [3]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert read_metadata(path, prefix="a.") == {
        "u8": 255,
        "i64": -(2**40),
        "f64": 0.1,
        "bool": True,
        "text": "é🙂",
        "ints": [1, -2],
        "texts": ["x", ""],
        "nested": [[1, 2], [3]],
    }
    assert read_metadata(path)["general.architecture"] == "llama"


@pytest.mark.parametrize(
    ("rule", "text", "pieces"),
    [
        ("gpt-2", "ab 12", ["ab", " ", "1", "2"]),
        ("smollm", "ab 12", ["ab", " ", "1", "2"]),
        ("llama-bpe", "ab 12", ["<s>", "ab", " ", "1", "2"]),
        ("qwen2", "ab<think>e\u0301", ["ab", "<think>", "é"]),
    ],
)
def test_gguf_vocabularies(tmp_path: Path, rule: str, text: str, pieces: list[str]) -> None:
    tokens = ["<s>", "<think>", "a", "b", "ab", "Ġ", "1", "2", "Ã", "©", "Ã©"]
    path = tmp_path / f"{rule}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 4] + [1] * 9)
    writer.add_token_merges(["a b", "Ã ©"])
    writer.add_bos_token_id(0)
    writer.add_chat_template("{{ bos_token }}{{ messages[0].content }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokenizer = Tokenizer.load(str(path))
    assert [tokenizer.token_text(token) for token in tokenizer.encode(text)] == pieces
    assert tokenizer.render_chat(MESSAGES) == "<s>Hello"
    streamed = tokenizer.detokenizer().push(tokenizer.encode(text))
    assert streamed == text.replace("e\u0301", "é")


@pytest.mark.model
def test_the_demo_tokenizer_needs_no_torch(demo_model_path: Path) -> None:
    code = (
        "import sys; from cluster.tokenizer import Tokenizer; import cluster.ingress; "
        f"Tokenizer.load({str(demo_model_path)!r}); sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
