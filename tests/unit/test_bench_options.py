"""Settings of engines in benchmarks: the same on the command line, in our configuration and in vLLM's."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from engine.errors import ConfigError
from tests.bench import engine_options
from tests.bench.engine_options import EngineOptions
from tests.bench.models import engine_config

ALL = EngineOptions("virtual", False, 65_536, 131_072, 32, 20.5, 4)


def _parsed(words: list[str]) -> EngineOptions:
    parser = argparse.ArgumentParser()
    engine_options.add_arguments(parser)
    return engine_options.check(parser, parser.parse_args(words))


@pytest.mark.parametrize("options", [EngineOptions(), ALL, EngineOptions(prefix_caching=True)], ids=str)
def test_the_words_give_the_options_again(options: EngineOptions) -> None:
    assert _parsed(options.words()) == options


def test_our_engine_gets_them(tmp_path: Path) -> None:
    config = engine_config("llama-8b", tmp_path, ALL)
    memory, scheduler = config.memory, config.scheduler
    assert (memory.mode, memory.enable_prefix_caching, memory.pool_bytes) == ("virtual", False, 20_992 << 20)
    assert (scheduler.max_num_batched_tokens, scheduler.max_prefill_tokens) == (8192, 65_536)
    assert (scheduler.max_num_seqs, config.max_model_len) == (32, 131_072)
    assert scheduler.prefill_spread_steps == 4


def test_without_any_it_keeps_its_own(tmp_path: Path) -> None:
    config = engine_config("llama-8b", tmp_path)
    assert (config.memory.mode, config.memory.enable_prefix_caching) == ("elastic", True)
    assert (config.scheduler.max_prefill_tokens, config.scheduler.max_num_seqs) == (None, 256)
    assert (config.max_model_len, engine_config("demo", tmp_path).max_model_len) == (None, 512)


def test_a_prefill_below_the_step_makes_the_step_smaller(tmp_path: Path) -> None:
    scheduler = engine_config("demo", tmp_path, EngineOptions(max_prefill_tokens=64)).scheduler
    assert (scheduler.max_num_batched_tokens, scheduler.largest_step) == (64, 64)
    with pytest.raises(ConfigError, match="max_num_batched_tokens"):
        engine_config("demo", tmp_path, EngineOptions(max_prefill_tokens=8))


def test_vllm_gets_them_under_its_names() -> None:
    assert EngineOptions().vllm_arguments() == {}
    assert ALL.vllm_arguments() == {
        "enable_prefix_caching": False,
        "max_num_batched_tokens": 65_536,
        "max_model_len": 131_072,
        "max_num_seqs": 32,
        "kv_cache_memory_bytes": int(20.5 * 2**30),
    }


@pytest.mark.parametrize("flag", ["--max-prefill-tokens", "--max-model-len", "--max-num-seqs", "--kv-gib"])
def test_numbers_that_cannot_be(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        _parsed([flag, "0"])
    assert ended.value.code == 2
    assert f"{flag} must be above 0, not 0" in capsys.readouterr().err
