"""Import contracts of pyproject.toml hold, and imports and declared dependencies are the same set."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

# Installed ahead of the dashboards that will import it, so that hosts are provisioned once.
BEFORE_ITS_USE = {"grafana-client"}
OWN = {"cluster", "engine", "kernels", "dashboards", "deploy", "tests"}

# Parts of a declared dependency that are released with it, and that its own documentation imports.
COMES_WITH = {"starlette": "fastapi", "pydantic-core": "pydantic", "cuda-bindings": "cuda-python"}


def normal(name: str) -> str:
    """A distribution's name as the packaging standard compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(pyproject: dict[str, Any]) -> set[str]:
    """Names of the runtime dependencies, those of extras for users included."""
    project = pyproject["project"]
    needs = [*project["dependencies"], *project["optional-dependencies"]["plan"]]
    return {normal(re.split(r"[^\w.-]", need, maxsplit=1)[0]) for need in needs}


def imported_modules(tree: ast.Module) -> set[str]:
    """Dotted names a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def distributions_of(trees: list[ast.Module]) -> dict[str, set[str]]:
    """For each third-party top-level module that is imported, the distributions that provide it."""
    modules = {name.partition(".")[0] for tree in trees for name in imported_modules(tree)}
    providers = importlib.metadata.packages_distributions()
    third_party = modules - sys.stdlib_module_names - OWN
    return {module: {normal(name) for name in providers.get(module, [])} for module in third_party}


def test_import_contracts(root: Path) -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_imports_and_dependencies_agree(
    root: Path, package_trees: dict[Path, ast.Module], pyproject: dict[str, Any]
) -> None:
    trees = list(package_trees.values())
    trees += [ast.parse(path.read_text()) for path in sorted((root / "dashboards").rglob("*.py"))]
    provided = distributions_of(trees)
    provided = {module: {COMES_WITH.get(name, name) for name in names} for module, names in provided.items()}
    undeclared = {module for module, names in provided.items() if not names & declared(pyproject)}
    assert not undeclared, "imported, but not among the dependencies of pyproject.toml"

    used = {name for names in provided.values() for name in names}
    unused = declared(pyproject) - used - BEFORE_ITS_USE
    assert not unused, "a dependency that nothing imports"
