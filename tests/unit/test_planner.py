"""`ballonet simulate`: engines in virtual time behind the real router and policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster import config
from cluster.bench.workload import BenchError, OptionError
from cluster.planner.calibration_file import read_calibrations, write_calibrations
from cluster.planner.demand import merged, read_source, sources_of
from cluster.planner.running import Wishes, run
from engine.calibration import DecodePoint, PrefillPoint, StepPoints
from engine.errors import ConfigError
from engine.step_times import StepWork
from tests.bench.swinging_load import TINY_LLAMA

FIGURES = {
    "source": "made up",
    "prefill": [{"tokens": 64, "seconds": 0.02}, {"tokens": 256, "seconds": 0.06}],
    "decode": [{"batch": 1, "context": 64, "seconds": 0.01}, {"batch": 8, "context": 64, "seconds": 0.02}],
    "link_bytes_s": 1e9,
    "pin_s_per_gib": 0.0,
    "load_s": 2.0,
}
FILE = """
applications:
  - name: ballonet
    import_path: cluster.app:build
    args:
      llm_configs:
        - model_loading_config: {{model_id: tiny, model_source: {folder}}}
          engine_kwargs: {{device: cpu, max_num_seqs: 8, max_num_batched_tokens: 256}}
          memory: {{pool_bytes: 16MiB, balloon_bytes: 64MiB, balloon_slab_bytes: 4MiB}}
          slo: {{ttft_ms: 300, tpot_ms: 50}}
          deployment_config: {{num_replicas: 2}}
"""


def _run(folder: Path, level: str, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(TINY_LLAMA))
    (folder / "serve.yaml").write_text(FILE.format(folder=folder))
    write_calibrations(folder / "figures.json", {"tiny": FIGURES})
    wishes = Wishes(
        folder / "serve.yaml", ("poisson:rate=8,in=200,out=40",), 0.004, 0.0, None, None, 8, 1 << 30,
        folder / "figures.json", None, level, "static", out, seed,
    )  # fmt: skip
    quiet = Console(quiet=True)
    found = run(config.load(wishes.path), wishes, quiet, quiet)
    times = found["all"]["controller"].pop("decide_ms")
    assert times["calls"] > 10
    del found["took_s"]
    return found


@pytest.mark.parametrize("level", ["request", "fluid"])
def test_the_same_seed_gives_the_same_figures_and_another_one_others(level: str, tmp_path: Path) -> None:
    first, again, other = (_run(tmp_path, level, seed) for seed in (0, 0, 1))
    assert first == again
    assert first["models"] != other["models"]


def test_every_request_ends_and_the_files_say_so(tmp_path: Path) -> None:
    found = _run(tmp_path, "request", out=tmp_path / "out")
    for name in ("controller", "static"):
        figures = found["models"]["tiny"][name]
        assert figures["requests"] == figures["ended"] > 50
        assert 0 < figures["attainment"] <= min(figures["ttft_attainment"], figures["tpot_attainment"])
        assert figures["replicas"] == {"least": 2, "most": 2, "mean": 2.0}
    assert found["all"]["controller"]["reversals_within_dwell"] == 0
    assert found["all"]["static"]["orders"] == 0
    assert found["level_told"].startswith("level: request")
    assert json.loads((tmp_path / "out/summary.json").read_text())["level"] == "request"
    assert (tmp_path / "out/picture.svg").read_text().count("<polyline") == 18
    assert (tmp_path / "out/curves.csv").read_text().startswith("run,time_s,model_id,load_rps,attainment")


def test_points_are_given_back_and_lines_go_on() -> None:
    steps = StepPoints(
        [PrefillPoint(64, 0, 0.02), PrefillPoint(256, 0, 0.06), PrefillPoint(256, 512, 0.08)],
        [DecodePoint(1, 64, 0.01), DecodePoint(8, 64, 0.02), DecodePoint(8, 512, 0.05)],
    )
    assert steps.step_s(StepWork(256, 0, 0, 256 * 128)) == pytest.approx(0.06)
    assert steps.step_s(StepWork(256, 0, 0, 256 * 640)) == pytest.approx(0.08)
    assert steps.step_s(StepWork(0, 8, 8 * 512, 0.0)) == pytest.approx(0.05)
    both = steps.step_s(StepWork(256, 8, 8 * 512, 256 * 128))
    assert 0.06 < both < 0.06 + 0.05
    assert steps.step_s(StepWork(512, 0, 0, 0.0)) > steps.step_s(StepWork(256, 0, 0, 0.0))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("nowhere.csv", "no such file"),
        ("poisson:rate=0", "rate must be"),
        ("poisson:speed=3", "'speed' is not known"),
        ("day:swing=2", "from 0 to 1"),
    ],
)
def test_a_load_that_cannot_be_is_refused_by_name(text: str, word: str) -> None:
    with pytest.raises(OptionError, match=word):
        read_source(text)


def test_a_traces_bad_line_and_an_unknown_file_are_named(tmp_path: Path) -> None:
    bad = tmp_path / "azure.csv"
    bad.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00,10,5\n2024-05-10 00:00:01,x,5\n"
    )
    with pytest.raises(BenchError, match="line 3: `ContextTokens`"):
        read_source(str(bad))
    bad.write_text("a,b\n")
    with pytest.raises(OptionError, match="line 1"):
        read_source(str(bad))


def test_each_model_of_several_needs_its_own_trace(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="none for b"):
        sources_of(["a=poisson:rate=1"], ["a", "b"])
    with pytest.raises(OptionError, match="no model 'c'"):
        sources_of(["c=poisson:rate=1"], ["a", "b"])
    asked = list(merged(sources_of(["poisson:rate=2"], ["a", "b"]), 0, 0.0, 100.0))
    assert [one.at_s for one in asked] == sorted(one.at_s for one in asked)
    assert {one.model for one in asked} == {0, 1}
    assert 300 < len(asked) < 500


def test_a_calibrations_bad_field_is_named(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text(json.dumps({"models": {"tiny": FIGURES | {"load_s": "soon"}}}))
    with pytest.raises(ConfigError, match="load_s"):
        read_calibrations(path)
