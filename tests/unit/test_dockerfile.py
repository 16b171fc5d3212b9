"""The Dockerfile against the tree it copies from and the manifest that runs its image; nothing is built."""

from __future__ import annotations

import fnmatch
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from typer.testing import CliRunner

from cluster import cli

ROOT = Path(__file__).parents[2]
PYTHON_OF = {"ubuntu22.04": "3.10", "ubuntu24.04": "3.12"}  # what python3 is there


def _instructions(text: str) -> list[tuple[str, str]]:
    """(keyword, the rest), in order; comments go, also those inside of a continued line."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(line.split(maxsplit=1)[0].upper(), line.split(maxsplit=1)[1]) for line in joined]


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    return _instructions((ROOT / "deploy" / "Dockerfile").read_text())


def _all(instructions: list[tuple[str, str]], keyword: str) -> list[str]:
    return [rest for found, rest in instructions if found == keyword]


def _is_sent(path: str, patterns: list[str]) -> bool:
    """Whether .dockerignore lets a path through: the last pattern that fits it, or a folder above, wins."""
    parts = path.split("/")
    ways = ["/".join(parts[: count + 1]) for count in range(len(parts))]
    sent = True
    for pattern in patterns:
        wanted = pattern.removeprefix("!")
        names = parts if wanted.startswith("**/") else ways
        if any(fnmatch.fnmatchcase(name, wanted.removeprefix("**/")) for name in names):
            sent = pattern.startswith("!")
    return sent


@pytest.fixture(scope="module")
def ignore() -> list[str]:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def _copied(instructions: list[tuple[str, str]]) -> list[str]:
    return [source.rstrip("/") for rest in _all(instructions, "COPY") for source in rest.split()[:-1]]


def test_what_is_copied_is_there_and_sent(instructions: list[tuple[str, str]], ignore: list[str]) -> None:
    sources = _copied(instructions)
    assert sources
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert [source for source in sources if not _is_sent(source, ignore)] == []
    assert _is_sent("engine/memory/native_cuda.c", ignore)  # compiled in the container, at its first start
    assert not _is_sent("engine/__pycache__", ignore)
    assert not _is_sent("tests/conftest.py", ignore)
    assert not _is_sent(".git/config", ignore)


def test_all_that_is_installed_is_copied(instructions: list[tuple[str, str]]) -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, wheel = pyproject["project"], pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", project["readme"], *project["license-files"], *wheel["packages"]}
    assert needed <= set(_copied(instructions))


def test_its_python_is_new_enough(instructions: list[tuple[str, str]]) -> None:
    (image,) = [
        rest.partition("=")[2] for rest in _all(instructions, "ARG") if rest.startswith("CUDA_IMAGE=")
    ]
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert PYTHON_OF[image.rpartition("-")[2]] in SpecifierSet(wanted)
    assert _all(instructions, "FROM") == ["${CUDA_IMAGE}"]


def test_it_has_what_others_call_in_it(instructions: list[tuple[str, str]]) -> None:
    """wget: KubeRay's probes. gcc and Python's headers: our helper, and Triton's launchers."""
    installed = next(rest for rest in _all(instructions, "RUN") if "apt-get install" in rest).split()
    assert {"wget", "gcc", "libc6-dev", "python3-dev", "python3-venv", "ca-certificates"} <= set(installed)
    assert "--no-install-recommends" in installed


def test_its_triton_is_torchs_own(instructions: list[tuple[str, str]]) -> None:
    """constraints.txt pins one for the torch without CUDA; with CUDA it asks for another: pip gives up."""
    install = next(rest for rest in _all(instructions, "RUN") if "/tmp/requirements.txt" in rest)
    (pattern,) = re.findall(r"grep -v '([^']+)' constraints.txt > /tmp/constraints.txt", install)
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert [pin.partition("==")[0] for pin in pins if re.search(pattern, pin)] == ["triton"]
    assert "-c /tmp/constraints.txt" in install


def test_its_commands_run(instructions: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (command,) = _all(instructions, "CMD")
    checks = [rest.split() for rest in _all(instructions, "RUN") if rest.startswith("ballonet ")]
    assert checks
    for name, *arguments in (json.loads(command), *checks):
        assert name in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
        assert CliRunner().invoke(cli.app, arguments, catch_exceptions=False).exit_code == 0


def test_the_manifest_fits_the_image(instructions: list[tuple[str, str]]) -> None:
    spec: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "kuberay.yaml").read_text())["spec"]
    cluster = spec["rayClusterConfig"]
    environment = dict(re.findall(r"(\w+)=(\S+)", " ".join(_all(instructions, "ENV"))))
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert str(pod["securityContext"]["runAsUser"]) == _all(instructions, "USER")[-1]
        assert f"{environment['HOME']}/.cache" in mounts
        assert environment["HF_HOME"].startswith(f"{environment['HOME']}/.cache/")
        assert environment["TRITON_CACHE_DIR"].startswith(f"{environment['HOME']}/.cache/")
        assert {mount["name"] for mount in container["volumeMounts"]} == {
            one["name"] for one in pod["volumes"]
        }
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert [str(ports["serve"])] == _all(instructions, "EXPOSE")
