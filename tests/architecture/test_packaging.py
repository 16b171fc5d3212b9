"""Three generic top-level names stay unambiguous, and importing them stays cheap.

Hugging Face's `kernels` distribution shares a name with ours, and transformers probes that name: an
import that has effects, a version that satisfies the probe or a second copy on `sys.path` would break
`import transformers` far from its cause.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PACKAGES = ("cluster", "engine", "kernels")
HEAVY = ("torch", "triton", "ray", "transformers")


def modules_after(statement: str, root: Path) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `statement`."""
    program = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_kernels_package_imports_nothing(package_trees: dict[Path, ast.Module]) -> None:
    tree = package_trees[Path("kernels/__init__.py")]
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not imports, "transformers imports kernels/__init__.py while it probes for another package"


def test_kernels_version_satisfies_no_probe() -> None:
    import kernels

    assert kernels.__version__ == "0.0.0"


def test_distribution_version_stays_below_every_probe(pyproject: dict[str, Any]) -> None:
    major, minor = (int(part) for part in pyproject["project"]["version"].split(".")[:2])
    assert (major, minor) < (0, 9), "transformers would take our `kernels` for Hugging Face's"


@pytest.mark.parametrize(
    "statement",
    [
        "import cluster, engine, kernels",
        "import engine.messages, engine.config, engine.errors, engine.sequence",
    ],
)
def test_light_imports_load_nothing_heavy(statement: str, root: Path) -> None:
    assert not modules_after(statement, root) & set(HEAVY)


@pytest.mark.parametrize("module", ["cluster.config", "cluster.cli"])
def test_command_line_starts_without_torch(module: str, root: Path) -> None:
    loaded = modules_after(f"import {module}", root)
    assert not loaded & {"torch", "triton", "transformers"}, "`ballonet --help` would take seconds"


@pytest.mark.parametrize("package", PACKAGES)
def test_one_copy_on_the_path(package: str, root: Path) -> None:
    entries = {Path(entry or ".").resolve() for entry in sys.path}
    copies = {entry for entry in entries if (entry / package / "__init__.py").is_file()}
    assert copies == {root.resolve()}, f"the first of several copies of {package} wins silently"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_other_distribution_provides_the_name(package: str) -> None:
    providers = set(importlib.metadata.packages_distributions().get(package, []))
    assert providers <= {"ballonet"}


def test_no_pin_or_dependency_installs_a_package_of_our_names(root: Path, pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    lines = (root / "constraints.txt").read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    wanted += project["dependencies"] + [
        r for extra in project["optional-dependencies"].values() for r in extra
    ]
    names = {re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower() for requirement in wanted}
    assert "torch" in names
    assert not names & set(PACKAGES)


def test_pins_agree_with_pyproject(root: Path, pyproject: dict[str, Any]) -> None:
    """A tool that pyproject.toml pins has the same pin in constraints.txt, or pip refuses both."""
    pins = set(re.findall(r"^[\w-]+==\S+", (root / "constraints.txt").read_text(), re.MULTILINE))
    exact = {need for need in pyproject["project"]["optional-dependencies"]["dev"] if "==" in need}
    assert exact
    assert exact <= pins


def test_nothing_edits_the_import_path(package_trees: dict[Path, ast.Module]) -> None:
    offenders = [
        f"{path}:{node.lineno}"
        for path, tree in package_trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"
    ]
    assert not offenders


def test_no_file_is_named_like_a_standard_module(package_trees: dict[Path, ast.Module]) -> None:
    """`python engine/x.py` puts engine/ first on the path, where queue.py would replace the library's."""
    offenders = [str(path) for path in package_trees if path.stem in sys.stdlib_module_names]
    assert not offenders
