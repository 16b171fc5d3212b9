"""Budgets that keep files and functions readable at a sitting."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_JIT_LINES = 160  # a kernel is one piece by nature: every split costs it registers or clarity


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method of a file, nested ones too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def is_jit(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether Triton compiles the function."""
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def num_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end of the body."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_files(root: Path, package_trees: dict[Path, ast.Module]) -> None:
    sizes = {path: len((root / path).read_text().splitlines()) for path in package_trees}
    offenders = [f"{path}: {size} lines" for path, size in sizes.items() if size > MAX_FILE_LINES]
    assert not offenders


@pytest.mark.parametrize(("jit", "limit"), [(False, MAX_FUNCTION_LINES), (True, MAX_JIT_LINES)])
def test_functions(jit: bool, limit: int, package_trees: dict[Path, ast.Module]) -> None:
    offenders = [
        f"{path}:{function.lineno} {function.name}: {num_lines(function)} lines, at most {limit}"
        for path, tree in package_trees.items()
        for function in functions(tree)
        if is_jit(function) == jit and num_lines(function) > limit
    ]
    assert not offenders


def test_public_names_have_docstrings(package_trees: dict[Path, ast.Module]) -> None:
    """Modules, and the public classes and functions at their top level. Methods may speak by their name."""
    missing = []
    for path, tree in package_trees.items():
        if not ast.get_docstring(tree):
            missing.append(f"{path}: the module")
        for node in tree.body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if not node.name.startswith("_") and not ast.get_docstring(node):
                missing.append(f"{path}:{node.lineno} {node.name}")
    assert not missing, f"{len(missing)} without a docstring"
