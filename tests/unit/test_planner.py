"""`ballonet simulate`: engines in virtual time behind the real router and policy."""

from __future__ import annotations

import importlib.util
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster import config
from cluster.bench.workload import BenchError, OptionError
from cluster.planner.calibration_file import read_calibrations, write_calibrations
from cluster.planner.command import checked_picture
from cluster.planner.demand import merged, read_source, sources_of
from cluster.planner.output import tables
from cluster.planner.running import Wishes, run
from engine.calibration import DecodePoint, PrefillPoint, StepPoints
from engine.errors import ConfigError
from engine.step_times import StepWork
from tests.bench.swinging_load import TINY_LLAMA

FIGURES = {
    "source": "made up",
    "device": "cpu",
    "prefill": [{"tokens": 64, "seconds": 0.02}, {"tokens": 256, "seconds": 0.06}],
    "decode": [{"batch": 1, "context": 64, "seconds": 0.01}, {"batch": 8, "context": 64, "seconds": 0.02}],
    "link_bytes_s": 1e9,
    "pin_s_per_gib": 0.0,
    "load_s": 2.0,
}
QUIET = Console(quiet=True)
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


def _run(folder: Path, seed: int = 0, out: Path | None = None, picture: Path | None = None) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(TINY_LLAMA))
    (folder / "serve.yaml").write_text(FILE.format(folder=folder))
    write_calibrations(folder / "figures.json", {"tiny": FIGURES})
    wishes = Wishes(
        folder / "serve.yaml",
        ("poisson:rate=8,in=200,out=40",),
        hours=0.004,
        host_bytes=1 << 30,
        calibration=folder / "figures.json",
        compare="static",
        out=out,
        picture=picture,
        seed=seed,
    )
    found = run(config.load(wishes.path), wishes, QUIET, QUIET)
    times = found["all"]["controller"].pop("decide_ms")
    assert times["calls"] > 10
    del found["took_s"]
    return found


def test_the_same_seed_gives_the_same_figures_and_another_one_others(tmp_path: Path) -> None:
    first, again, other = (_run(tmp_path, seed) for seed in (0, 0, 1))
    assert first == again
    assert first["models"] != other["models"]


def test_every_request_ends_and_the_files_say_so(tmp_path: Path) -> None:
    found = _run(tmp_path, out=tmp_path / "out")
    for name in ("controller", "static"):
        figures = found["models"]["tiny"][name]
        assert figures["requests"] == figures["ended"] > 50
        assert 0 < figures["attainment"] <= min(figures["ttft_attainment"], figures["tpot_attainment"])
        assert figures["replicas"] == {"least": 2, "most": 2, "mean": 2.0}
    assert found["all"]["controller"]["reversals_within_dwell"] == 0
    assert found["all"]["static"]["orders"] == 0
    assert any(one.startswith("migration") for one in found["not_simulated"])
    written = json.loads((tmp_path / "out/summary.json").read_text())
    assert written["models"] == found["models"]
    assert (tmp_path / "out/curves.csv").read_text().startswith("run,time_s,model_id,load_rps,ended")


def test_tables_fit_a_terminal(tmp_path: Path) -> None:
    found = _run(tmp_path)
    found["all"]["controller"]["decide_ms"] = None
    text = Console(width=80, record=True, file=io.StringIO())
    text.print(tables(found))
    shown = text.export_text()
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    for word in ("GPUs", "TTFT p50", "balloons", "not simulated"):
        assert word in shown


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'ballonet[plan]'")
    _run(tmp_path, picture=tmp_path / "a/plan.svg")
    text = (tmp_path / "a/plan.svg").read_text()
    assert "<svg" in text
    assert len(text) > 20_000


def test_a_picture_without_matplotlib_is_refused_before_anything_is_simulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"pip install 'ballonet\[plan\]'"):
        checked_picture(tmp_path / "plan.png")
    with pytest.raises(OptionError, match="must end with"):
        checked_picture(tmp_path / "plan.gif")


DEPLOYED = sorted((Path(__file__).parents[2] / "deploy").glob("*.yaml"))


@pytest.mark.parametrize("path", DEPLOYED, ids=lambda path: path.stem)
def test_every_file_to_deploy_can_be_simulated(path: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA | {"max_position_embeddings": 32_768}))
    text = re.sub(r"model_source: \S+", f"model_source: {tmp_path}", path.read_text())
    (tmp_path / path.name).write_text(text)
    write_calibrations(tmp_path / "figures.json", {"smollm2-135m-instruct": FIGURES})
    wishes = Wishes(tmp_path / path.name, ("poisson:rate=2,in=60,out=10",), hours=0.002, gpu="h100")
    if path.stem == "laptop":
        wishes = replace(wishes, gpu=None, calibration=tmp_path / "figures.json")
    found = run(config.load(wishes.path), wishes, QUIET, QUIET)
    for one in found["models"].values():
        assert one["controller"]["ended"] == one["controller"]["requests"] > 3
        assert one["controller"]["attainment"] > 0.5
    assert found["all"]["controller"]["gpus"] == {"laptop": 0, "cluster": 3, "kuberay": 2}.get(path.stem, 1)


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
        ("poisson:in=abc", "in must be a number"),
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
    bad.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n")
    with pytest.raises(BenchError, match="no request that can be used"):
        read_source(str(bad))
    bad.write_text("")
    with pytest.raises(OptionError, match="is empty"):
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


@pytest.mark.parametrize(
    ("gpu", "figures", "word"),
    [
        (None, None, "--calibrate figures.json"),  # a CPU
        ("v100", None, "nothing is known of the GPU v100"),
        (None, "another", "figures of another, and the file has smollm2"),
    ],
)
def test_what_a_plan_lacks_is_named(gpu: str | None, figures: str | None, word: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    text = (Path(__file__).parents[2] / "deploy/laptop.yaml").read_text()
    (tmp_path / "laptop.yaml").write_text(re.sub(r"model_source: \S+", f"model_source: {tmp_path}", text))
    path = None
    if figures is not None:
        path = tmp_path / "figures.json"
        write_calibrations(path, {figures: FIGURES})
    wishes = Wishes(tmp_path / "laptop.yaml", ("poisson:rate=2",), hours=0.002, gpu=gpu, calibration=path)
    with pytest.raises(ConfigError, match=word):
        run(config.load(wishes.path), wishes, QUIET, QUIET)


def test_a_load_that_has_ended_by_then_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00,10,5\n2024-05-10 00:30:00,10,5\n"
    )
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    (tmp_path / "serve.yaml").write_text(FILE.format(folder=tmp_path))
    write_calibrations(tmp_path / "figures.json", {"tiny": FIGURES})
    wishes = Wishes(
        tmp_path / "serve.yaml",
        (str(tmp_path / "trace.csv"),),
        from_hour=2.0,
        calibration=tmp_path / "figures.json",
    )
    with pytest.raises(OptionError, match=r"the load lasts 0\.50 hours"):
        run(config.load(wishes.path), wishes, QUIET, QUIET)
