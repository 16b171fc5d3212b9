"""Commands of tests/bench that cannot run: a message and an exit status, no traceback, no file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from engine.errors import BallonetError
from tests.bench import (
    ablation_ladder,
    engine_side_by_side,
    gpu_kernels,
    memory_targets,
    run_engine,
    ttft_curves,
)

WRONG_OPTION = 2


def _run(
    command: ModuleType, words: list[str], monkeypatch: pytest.MonkeyPatch, gpu: bool = False
) -> str | int | None:
    """What the command ends with: an exit status, or the message that stands for status 1."""
    monkeypatch.setattr("sys.argv", ["command", *words])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    with pytest.raises(SystemExit) as ended:
        command.main()
    return ended.value.code


def _engine_words(tmp_path: Path, *words: str) -> list[str]:
    workload = [] if "--workload" in words else ["--workload", "demo-single-64+32"]
    return [*words, *workload, "--out", str(tmp_path / "result.json")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--engine", "ballonet", "--rounds", "0"), "--rounds must be at least 1"),
        (("--engine", "ballonet", "--workload", "nope"), "no workload is called 'nope'"),
        (("--engine", "ballonet", "--model", "demo", "--idle"), "--idle is for"),
        (("--engine", "vllm", "--idle"), "--idle is for"),
        (("--engine", "vllm", "--model", "demo"), "vLLM is measured with --model llama-8b"),
        (("--engine", "vllm", "--mode", "static"), "--mode is of our engine"),
        (("--engine", "vllm", "--balloon-gib", "0"), "--balloon-gib is of our engine"),
        (("--engine", "vllm", "--no-deposit"), "--deposit is of our engine"),
        (("--engine", "ballonet", "--mode", "paged"), "invalid choice: 'paged'"),
        (("--engine", "ballonet", "--seconds", "0"), "--seconds must be above 0"),
        (("--engine", "ballonet", "--max-num-seqs", "-1"), "--max-num-seqs must be above 0"),
        (("--engine", "ballonet", "--idle", "--workload", "chats-64x10x1024"), "do not all decode at once"),
    ],
)
def test_options_of_one_engine_that_cannot_be(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _run(run_engine, _engine_words(tmp_path, *words), monkeypatch, gpu=True) == WRONG_OPTION
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--workload", "nope"], "no workload is called 'nope'"),
        (["--model", "demo"], "give --engines ballonet"),
        (["--kv-gib", "0"], "--kv-gib must be above 0"),
    ],
)
def test_options_of_both_engines_that_cannot_be(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(engine_side_by_side, words, monkeypatch) == WRONG_OPTION
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mode", "static"], "name those to climb with --rungs"),
        (["--policy", "slo"], "name those to climb with --rungs"),
        (["--no-deposit"], "name those to climb with --rungs"),
        (["--rungs", "elastic", "slo", "--balloon-gib", "0"], "--balloon-gib 0 leaves nothing to slo"),
        (["--rungs", "vllm"], "invalid choice: 'vllm'"),
        (["--model", "demo", "--vllm-site", "."], "leave --vllm-site out"),
        (["--seconds", "-1"], "--seconds must be above 0"),
    ],
)
def test_options_of_the_ladder_that_cannot_be(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--workload", "demo-chats-4x3x96", *words]
    assert _run(ablation_ladder, words, monkeypatch, gpu=True) == WRONG_OPTION
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--share", "0"], "--share and --rates must be above 0"),
        (["--rates", "1", "-1"], "--share and --rates must be above 0"),
        (["--policy", "fcfs"], "leave --policy out"),
        (["--balloon-gib", "0"], "--balloon-gib above 0"),
        (["--seconds", "0"], "--seconds must be above 0"),
        (["--rate-requests", "0"], "--num-prompts must be at least 1"),
        (["--model", "demo", "--simulate"], "leave --model out"),
        (["--model", "demo", "--vllm-site", "."], "leave --vllm-site out"),
    ],
)
def test_options_of_the_curves_that_cannot_be(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(ttft_curves, words, monkeypatch, gpu=True) == WRONG_OPTION
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--sizes", "0"], ["--sizes", "64", "--piece", "65"], ["--modes", "x"]])
def test_options_of_the_memory_targets_that_cannot_be(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _run(memory_targets, words, monkeypatch, gpu=True) == WRONG_OPTION


def test_a_machine_without_a_gpu_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_engine = _engine_words(tmp_path, "--engine", "ballonet")
    ladder = ["--workload", "chats-64x10x1024"]
    commands = ((gpu_kernels, []), (engine_side_by_side, []), (memory_targets, []), (ttft_curves, []))
    for command, words in (*commands, (run_engine, one_engine), (ablation_ladder, ladder)):
        assert str(_run(command, words, monkeypatch)).startswith("no CUDA device")


def test_a_missing_vllm_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ended = _run(run_engine, _engine_words(tmp_path, "--engine", "vllm"), monkeypatch, gpu=True)
    assert "vLLM cannot be imported" in str(ended)


def test_what_the_engine_refuses_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise BallonetError("the pool is too small")

    monkeypatch.setattr(run_engine, "_load", refuse)
    ended = _run(run_engine, _engine_words(tmp_path, "--engine", "ballonet", "--model", "demo"), monkeypatch)
    assert ended == "ballonet cannot run this: the pool is too small"
    assert not list(tmp_path.iterdir())
