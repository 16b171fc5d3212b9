"""Configurations as transformers writes them, as the hub holds them, and as they go wrong."""

from __future__ import annotations

import dataclasses
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from transformers import MistralConfig, Qwen2Config

from engine.config import ModelSource
from engine.errors import ModelLoadError
from engine.model.config import ModelConfig, RopeConfig, load_model_config
from engine.model.rope import rope_tables
from tests.unit.hf_configs import PUBLIC

ROOT = Path(__file__).parents[2]
LLAMA_3_2_1B = {**PUBLIC["Llama-3.2-1B"], "eos_token_id": [128001, 128008, 128009]}


def read(directory: Path, content: dict[str, Any], **changes: Any) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps({**content, **changes}))
    return load_model_config(ModelSource("m", str(directory)))


def test_a_hub_configuration_of_llama_3_2(tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA_3_2_1B) == ModelConfig(
        family="LlamaForCausalLM",
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        rms_norm_eps=1e-5,
        max_position_embeddings=131072,
        rope=RopeConfig(500000.0, "llama3", 32.0, 1.0, 4.0, 8192),
        attention_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tie_word_embeddings=True,
        sliding_window=None,
        eos_token_ids=(128001, 128008, 128009),
        dtype=torch.bfloat16,
    )


def test_generation_config_adds_the_end_of_a_turn(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 128009]}))
    found = read(tmp_path, LLAMA_3_2_1B, eos_token_id=128001)
    assert found.eos_token_ids == (5, 128001, 128009)


def test_a_damaged_generation_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"generation_config\.json"):
        read(tmp_path, LLAMA_3_2_1B)


def test_no_eos_is_no_error(tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA_3_2_1B, eos_token_id=None).eos_token_ids == ()


def test_mistral_is_limited_to_its_window(tmp_path: Path) -> None:
    MistralConfig(sliding_window=4096, max_position_embeddings=32768).save_pretrained(tmp_path)
    found = load_model_config(ModelSource("m", str(tmp_path)))
    assert (found.sliding_window, found.max_context) == (4096, 4096)


@pytest.mark.parametrize(
    ("is_used", "first_sliding_layer", "window"), [(False, 0, None), (True, 0, 512), (True, 2, None)]
)
def test_qwen2_window_counts_only_if_a_layer_has_it(
    tmp_path: Path, is_used: bool, first_sliding_layer: int, window: int | None
) -> None:
    Qwen2Config(
        num_hidden_layers=2,
        use_sliding_window=is_used,
        sliding_window=512,
        max_window_layers=first_sliding_layer,
    ).save_pretrained(tmp_path)
    found = load_model_config(ModelSource("m", str(tmp_path)))
    assert found.sliding_window == window
    assert found.attention_bias
    assert not found.output_bias


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification; supported"),
        (
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
            "GPT2LMHeadModel; supported are Llama",
        ),
        ({"model_type": "no-such-model"}, "cannot read the configuration"),
        ({"hidden_act": "gelu"}, "activation gelu"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "'dynamic'"),
        ({"num_key_value_heads": 5}, "32 query heads cannot share 5"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        read(tmp_path, LLAMA_3_2_1B, **changes)


@pytest.mark.parametrize(
    ("source", "load_format", "message"),
    [
        ("/no/such/directory", "auto", "there is no directory"),
        ("./nowhere", "auto", "there is no directory"),
        ("nowhere", "auto", "there is no directory"),
        ("/no/such/model.gguf", "auto", "there is no file"),
        ("{tmp}", "auto", "no config.json"),
        ("{tmp}", "gguf", r"must end in \.gguf"),
        ("{tmp}/notes.txt", "auto", "not a .gguf file"),
        ("{tmp}/model.gguf", "safetensors", "is a GGUF file"),
        ("{tmp}/model.gguf", "auto", "does not begin with GGUF"),
        ("{tmp}/empty.gguf", "auto", "empty.gguf"),
    ],
)
def test_wrong_sources_say_what_to_do(tmp_path: Path, source: str, load_format: Any, message: str) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "model.gguf").write_text("not a model")
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(ModelLoadError, match=message):
        load_model_config(ModelSource("m", source.format(tmp=tmp_path), load_format=load_format))


def test_an_unreachable_hub_id_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match="check the id, the network"):
        load_model_config(ModelSource("m", "nobody/no-such-model"))


# Loads each model named and prints what came of it, and which heavy modules that brought in.
PROGRAM = """
import json, sys
from engine.config import ModelSource
from engine.errors import ModelLoadError
from engine.model.config import load_model_config
found = []
for source in sys.argv[1:]:
    try:
        found.append(list(load_model_config(ModelSource("m", source)).eos_token_ids))
    except ModelLoadError as error:
        found.append(str(error))
print(json.dumps([found, [name for name in ("transformers", "ray") if name in sys.modules]]))
"""


def load_in_a_fresh_process(*sources: str, **environment: str) -> list[Any]:
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM, *sources],
        cwd=ROOT,
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    found, heavy = json.loads(answer.stdout.splitlines()[-1])
    assert not heavy, "transformers costs an engine's start 11 s on a GPU host"
    return cast("list[Any]", found)


HUB_FILES: dict[str, Any] = {
    "lab/chat": {"config.json": LLAMA_3_2_1B, "generation_config.json": {"eos_token_id": [5, 128009]}},
    "lab/base": {"config.json": LLAMA_3_2_1B},
    "lab/cut": {"config.json": LLAMA_3_2_1B},
    "lab/only-gguf": {},
}


class _Hub(http.server.BaseHTTPRequestHandler):
    """The few answers of a model hub that a reader of configurations sees."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        owner, name, _, revision, file = self.path.split("?")[0].strip("/").split("/")
        repository = f"{owner}/{name}"
        if repository == "lab/gated":
            return self._refuse(403, "GatedRepo")
        if repository not in HUB_FILES:
            return self._refuse(404, "RepoNotFound")
        if file not in HUB_FILES[repository]:
            return self._refuse(404, "EntryNotFound")
        body = json.dumps(HUB_FILES[repository][file]).encode()
        self.send_response(200)
        self.send_header("ETag", f'"{name}-{file}"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body[:9] if repository == "lab/cut" else body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are no output of the test."""


@pytest.fixture
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_directory_is_read_without_transformers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_2_1B))
    assert load_in_a_fresh_process(str(tmp_path)) == [[128001, 128008, 128009]]


def test_hub_ids_are_read_without_transformers_and_from_the_cache_later(tmp_path: Path, hub: str) -> None:
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "NO_PROXY": "127.0.0.1"}
    sources = ["lab/chat", "lab/base", "lab/only-gguf", "lab/gated", "lab/none", "lab/cut"]
    chat, base, *refused = load_in_a_fresh_process(*sources, HF_ENDPOINT=hub, **environment)
    assert (chat, base) == ([5, 128001, 128008, 128009], [128001, 128008, 128009])
    assert "lab/only-gguf has no config.json" in refused[0]
    for message, name in zip(refused[1:], sources[3:], strict=True):
        assert f"cannot read the configuration of {name}" in message
        assert "check the id, the network and, for a gated model, HF_TOKEN" in message
    offline = load_in_a_fresh_process(*sources[:2], HF_HUB_OFFLINE="1", **environment)
    assert offline == [chat, base]


def write_gguf(path: Path, arch: str = "llama", **extra: Any) -> Path:
    """A GGUF header with just enough tensors for a configuration."""
    writer = GGUFWriter(path, arch)
    writer.add_context_length(2048)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5e5)
    writer.add_token_list(["a", "b", "c"])
    writer.add_token_scores([0.0, 1.0, 2.0])
    writer.add_eos_token_id(2)
    for key, value in extra.items():
        if isinstance(value, np.ndarray):
            writer.add_tensor(key.replace("__", "."), value)
        else:
            writer.add_key_value(f"{arch}.{key.replace('__', '.')}", value, _kind(value))
    writer.add_tensor("token_embd.weight", np.zeros((3, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _kind(value: Any) -> Any:
    from gguf import GGUFValueType

    return GGUFValueType.STRING if isinstance(value, str) else GGUFValueType.UINT32


def test_gguf_metadata(tmp_path: Path) -> None:
    found = load_model_config(ModelSource("m", str(write_gguf(tmp_path / "m.gguf"))))
    assert (found.vocab_size, found.num_kv_heads, found.head_dim) == (3, 2, 16)
    assert (found.eos_token_ids, found.tie_word_embeddings, found.rope.theta) == ((2,), True, 5e5)


def test_gguf_carries_llama3_scaling_as_divisors(tmp_path: Path) -> None:
    divisors = np.linspace(1, 8, 8, dtype=np.float32)
    path = write_gguf(tmp_path / "m.gguf", rope_freqs__weight=divisors)
    rope = load_model_config(ModelSource("m", str(path))).rope
    scaled = rope_tables(rope, 16, 50, torch.device("cpu"))
    plain = rope_tables(dataclasses.replace(rope, scaling="default"), 16, 400, torch.device("cpu"))
    assert rope.scaling == "divisors"
    torch.testing.assert_close(scaled[0][48, 0], plain[0][48, 0])
    torch.testing.assert_close(scaled[1][48, 7], plain[1][6, 7])


@pytest.mark.parametrize(
    ("arch", "extra", "message"),
    [
        ("llama", {"rope__scaling__type": "yarn"}, "'yarn'"),
        ("llama", {"expert_count": 8}, "llama with experts"),
        ("llama", {"rope__dimension_count": 8}, "part of each head"),
        ("llama", {"rope_freqs__weight": np.ones(3, np.float32)}, "3 values, not 8"),
        ("gemma", {}, "architecture gemma; supported are llama, qwen2, qwen3"),
    ],
)
def test_gguf_that_is_not_supported(tmp_path: Path, arch: str, extra: Any, message: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", arch, **extra)
    with pytest.raises(ModelLoadError, match=message):
        load_model_config(ModelSource("m", str(path)))


def test_a_gguf_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(1, 400, 7), len(whole) - 100]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelLoadError, match="cut"):
            load_model_config(ModelSource("m", str(cut)))


def test_hostile_lengths_in_a_gguf_header_are_refused(tmp_path: Path) -> None:
    whole = bytearray(write_gguf(tmp_path / "m.gguf").read_bytes())
    whole[24:32] = b"\xff" * 8  # the length of the first key
    path = tmp_path / "m.gguf"
    path.write_bytes(whole)
    with pytest.raises(ModelLoadError, match="inside its header"):
        load_model_config(ModelSource("m", str(path)))
