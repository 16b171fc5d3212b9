"""Settings of engines in benchmarks: the same on the command line, in our configuration and in vLLM's."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from engine.config import EngineConfig, ModelSource, SloConfig
from engine.errors import ConfigError
from tests.bench import engine_options
from tests.bench.engine_options import EngineOptions
from tests.bench.models import engine_config

ALL = EngineOptions(
    "virtual",
    False,
    65_536,
    131_072,
    32,
    20.5,
    4,
    100.25,
    "fcfs",
    False,
    16,
    False,
    ttft_slo_ms=900,
    tpot_slo_ms=40,
)


def _parsed(words: list[str]) -> EngineOptions:
    parser = argparse.ArgumentParser()
    engine_options.add_arguments(parser)
    return engine_options.check(parser, parser.parse_args(words))


@pytest.mark.parametrize(
    "options",
    [EngineOptions(), ALL, EngineOptions(prefix_caching=True, balloon_gib=0.0, deposit=True)],
    ids=["none", "all", "some"],
)
def test_the_words_give_the_options_again(options: EngineOptions) -> None:
    assert _parsed(options.words()) == options


def test_our_engine_gets_them(tmp_path: Path) -> None:
    config = engine_config("llama-8b", tmp_path, ALL)
    memory, scheduler = config.memory, config.scheduler
    assert (memory.mode, memory.enable_prefix_caching, memory.pool_bytes) == ("virtual", False, 20_992 << 20)
    assert (scheduler.max_num_batched_tokens, scheduler.max_prefill_tokens) == (8192, 65_536)
    assert (scheduler.max_num_seqs, config.max_model_len) == (32, 131_072)
    assert (scheduler.prefill_spread_steps, scheduler.turn_tokens) == (4, 16)
    assert (memory.balloon_bytes, scheduler.policy) == (102_656 << 20, "fcfs")
    assert (scheduler.deposit, scheduler.layer_wise) == (False, False)
    assert config.slo == SloConfig(900, 40)


def test_without_any_it_keeps_its_own(tmp_path: Path) -> None:
    config = engine_config("llama-8b", tmp_path)
    assert (config.memory.mode, config.memory.enable_prefix_caching) == ("elastic", True)
    assert (config.scheduler.max_prefill_tokens, config.scheduler.max_num_seqs) == (None, 256)
    assert (config.max_model_len, engine_config("demo", tmp_path).max_model_len) == (None, 512)
    own = EngineConfig(ModelSource("m", "nowhere"))
    assert config.memory.balloon_bytes == own.memory.balloon_bytes
    for name in ("policy", "deposit", "turn_tokens", "layer_wise", "prefill_spread_steps"):
        assert getattr(config.scheduler, name) == getattr(own.scheduler, name)


def test_ours_is_told_what_every_engine_is_judged_by(tmp_path: Path) -> None:
    options = EngineOptions()
    assert options.objectives_ms == {"ttft": 2000.0, "tpot": 150.0}
    assert engine_config("demo", tmp_path, options).slo == SloConfig(2000.0, 150.0)
    assert ALL.of_any_engine().objectives_ms == ALL.objectives_ms == {"ttft": 900, "tpot": 40}


def test_no_balloon_is_a_size_too(tmp_path: Path) -> None:
    assert engine_config("llama-8b", tmp_path, EngineOptions(balloon_gib=0.0)).memory.balloon_bytes == 0


def test_a_rival_gets_nothing_that_is_ours_alone() -> None:
    rivals = ALL.of_any_engine()
    assert rivals.vllm_arguments() == ALL.vllm_arguments()
    assert set(ALL.told()) - set(rivals.told()) == set(engine_options.OURS)


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        *(
            ([flag, "0"], f"{flag} must be above 0, not 0")
            for flag in ("--max-prefill-tokens", "--max-model-len", "--max-num-seqs", "--kv-gib")
        ),
        (["--turn-tokens", "0"], "--turn-tokens must be above 0"),
        (["--ttft-slo-ms", "0"], "--ttft-slo-ms must be above 0"),
        (["--tpot-slo-ms", "inf"], "--tpot-slo-ms must be above 0, not inf"),
        (["--balloon-gib", "-1"], "--balloon-gib must be at least 0, not -1.0"),
        (["--policy", "lifo"], "invalid choice: 'lifo'"),
    ],
)
def test_numbers_that_cannot_be(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        _parsed(words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
