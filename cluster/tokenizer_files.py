"""Reads a tokenizer from where a model keeps it: a directory, a hub id or a GGUF file.

Owns file formats only; `cluster.tokenizer` owns what is done with the result. The common formats (a
`tokenizer.json`, or a GGUF file with a byte-level vocabulary) are read without transformers' tokenizer
classes, because those import torch: an ingress would spend 250 MB and seconds on a library it never
calls. Whatever is not common (sentencepiece, unknown splitting rules) goes to transformers after all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from cluster.gguf_metadata import read_metadata
from engine.errors import ModelLoadError

_HUB_FILES = [
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "config.json",
    "*.model",
    "merges.txt",
]
_HUB_FILES += ["vocab.json", "added_tokens.json"]
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_CONTROL, _USER_DEFINED = 3, 4  # GGUF token types

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What a model's files say about its tokenizer.

    Attributes:
        chat_template: Jinja source; None if the model has none.
        special_tokens: `bos_token`, `eos_token` ... as templates name them.
    """

    backend: Backend
    chat_template: str | None
    special_tokens: Mapping[str, str]


def read_tokenizer(source: str) -> TokenizerFiles:
    """The tokenizer at a directory, a `.gguf` file or a hub id.

    Raises:
        ModelLoadError: nothing there, or nothing that is a tokenizer.
    """
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        return _read_gguf(path)
    directory = path if path.is_dir() else _download(source)
    if (directory / "tokenizer.json").is_file():
        return _read_directory(directory)
    return _through_transformers(directory)


def _download(source: str) -> Path:
    if Path(source).is_absolute() or source.startswith((".", "~")):
        raise ModelLoadError(f"no tokenizer at {source!r}: there is no such directory")
    try:
        return Path(snapshot_download(source, allow_patterns=_HUB_FILES))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelLoadError(
            f"no tokenizer at {source!r}: neither a directory nor a model the hub would give ({error})"
        ) from error


def _read_directory(directory: Path) -> TokenizerFiles:
    try:
        backend = Backend.from_file(str(directory / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception for every fault of the file
        raise ModelLoadError(f"{directory / 'tokenizer.json'} cannot be read: {error}") from error
    config = _read_json(directory / "tokenizer_config.json")
    special = {name: _token_text(config[name]) for name in _SPECIAL_NAMES if config.get(name)}
    return TokenizerFiles(backend, _directory_template(directory, config), special)


def _directory_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    template = _read_json(directory / "chat_template.json").get("chat_template") or config.get(
        "chat_template"
    )
    return _default_template(template)


def _default_template(template: Any) -> str | None:
    """A template, or the one called `default` of several: by name, or in a list of name and template."""
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        template = template.get("default")
    return cast("str | None", template)


def _token_text(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ModelLoadError(f"{path} is not JSON: {error}") from error


def _read_gguf(path: Path) -> TokenizerFiles:
    if not path.is_file():
        raise ModelLoadError(f"no tokenizer at {str(path)!r}: there is no such file")
    fields = read_metadata(path, prefix="tokenizer.")
    if "ggml.tokens" not in fields:
        raise ModelLoadError(f"{path} holds no tokenizer; set tokenizer_source")
    tokens = fields["ggml.tokens"]
    backend = _byte_level_backend(fields)
    if backend is None:
        return _through_transformers(path)
    special = {
        f"{name}_token": tokens[fields[f"ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"ggml.{key}_token_id" in fields
    }
    return TokenizerFiles(backend, fields.get("chat_template"), special)


def _byte_level_backend(fields: Mapping[str, Any]) -> Backend | None:
    """A byte-level BPE tokenizer; None if the file's vocabulary or splitting rule is another."""
    splitter = _splitters().get(fields.get("ggml.pre", "default"))
    if fields.get("ggml.model") != "gpt2" or splitter is None or "ggml.merges" not in fields:
        return None
    tokens, rule = fields["ggml.tokens"], fields.get("ggml.pre")
    merges = [cast("tuple[str, str]", tuple(merge.split(" "))) for merge in fields["ggml.merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    # Llama 3 takes a word that is a token as that token, whatever the merges say.
    backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=rule == "llama-bpe"))
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.ByteLevel()
    if rule == "qwen2":
        backend.normalizer = normalizers.NFC()
    kinds = list(zip(tokens, fields.get("ggml.token_type", ()), strict=False))
    backend.add_special_tokens([AddedToken(t, normalized=False) for t, kind in kinds if kind == _CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False) for t, kind in kinds if kind == _USER_DEFINED])
    if fields.get("ggml.add_bos_token", rule == "llama-bpe") and "ggml.bos_token_id" in fields:
        bos = fields["ggml.bos_token_id"]
        backend.post_processor = processors.TemplateProcessing(
            single=[tokens[bos], "$A"], pair=None, special_tokens=[(tokens[bos], bos)]
        )
    return backend


def _splitters() -> dict[str, Any]:
    """By GGUF's name of the rule: how text is cut into words before merging."""

    def split(digits: str) -> Any:
        rule = pre_tokenizers.Split(Regex(f"{_LETTERS}|{digits}|{_REST}"), behavior="isolated")
        return pre_tokenizers.Sequence(
            [rule, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )

    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return {
        "gpt-2": gpt2,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]),
        "llama-bpe": split(r"\p{N}{1,3}"),
        "qwen2": split(r"\p{N}"),
    }


def _through_transformers(path: Path) -> TokenizerFiles:
    from transformers import AutoTokenizer  # imports torch: only for what the readers above cannot do

    try:
        if path.suffix == ".gguf":
            loaded = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        else:
            loaded = AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelLoadError(f"no usable tokenizer at {str(path)!r}: {error}") from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise ModelLoadError(f"the tokenizer at {str(path)!r} has no fast form, which streaming needs")
    special = {
        name: str(token) for name, token in loaded.special_tokens_map.items() if isinstance(token, str)
    }
    return TokenizerFiles(backend, _default_template(loaded.chat_template), special)
