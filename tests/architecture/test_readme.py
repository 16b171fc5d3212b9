"""README.md names every file and every dependency, and nothing that is gone.

The tree is the fenced block under the heading "## Files". Each line is

    path  comment

with at least two spaces between. A path that ends in `/` is a folder; lines indented under it are
relative to it, so both of these name engine/memory/pool.py:

    engine/                        one GPU
      memory/                      the elastic pool
        pool.py                    the one door the scheduler uses
    engine/memory/pool.py          the one door the scheduler uses

Every Python file, YAML file and script outside tests/ must have a line; others may. `__init__.py`
files and files whose name starts with a dot need none: their folder's line speaks for them.

The dependencies are a table under "## Dependencies" whose first column holds their names in
backticks, such as `ray[serve]`; development tools may be left out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

NEEDS_A_LINE = {".py", ".yaml", ".yml", ".sh"}


@pytest.fixture(scope="module")
def readme(root: Path) -> str:
    """The text of README.md."""
    return (root / "README.md").read_text()


def section(readme: str, heading: str) -> str:
    """The text between a second-level heading and the next one."""
    parts = re.split(rf"^## {heading}[ ]*$", readme, flags=re.MULTILINE)
    assert len(parts) == 2, f"README.md needs one heading '## {heading}', it has {len(parts) - 1}"
    return re.split(r"^## ", parts[1], maxsplit=1, flags=re.MULTILINE)[0]


def tree_paths(block: str) -> dict[str, str]:
    """Paths of a tree block, folders with their slash, and the comment of each."""
    folders: list[tuple[int, str]] = []
    paths: dict[str, str] = {}
    for line in filter(str.strip, block.splitlines()):
        indent = len(line) - len(line.lstrip())
        name, _, comment = line.strip().partition("  ")
        while folders and folders[-1][0] >= indent:
            folders.pop()
        path = (folders[-1][1] if folders else "") + name
        assert path not in paths, f"the tree names {path} twice"
        paths[path] = comment.strip()
        if name.endswith("/"):
            folders.append((indent, path))
    return paths


@pytest.fixture(scope="module")
def tree(readme: str) -> dict[str, str]:
    """The README's tree."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", section(readme, "Files"), flags=re.MULTILINE | re.DOTALL)
    assert blocks, "no fenced block under '## Files'"
    return tree_paths(blocks[0])


def needs_a_line(path: Path, root: Path) -> bool:
    """Whether the tree has to name a file."""
    if path.parts[0] == "tests" or path.name == "__init__.py" or path.name.startswith("."):
        return False
    is_script = (root / path).read_bytes()[:2] == b"#!"
    return path.suffix in NEEDS_A_LINE or is_script or path.name == "Dockerfile"


def test_tree_is_complete(tree: dict[str, str], repository_files: list[Path], root: Path) -> None:
    missing = [str(path) for path in repository_files if needs_a_line(path, root) and str(path) not in tree]
    assert not missing, "files without a line in README.md's tree"


def test_tree_is_current(tree: dict[str, str], root: Path) -> None:
    stale = [
        path
        for path in tree
        if not ((root / path).is_dir() if path.endswith("/") else (root / path).is_file())
    ]
    assert not stale, "lines of README.md's tree whose file is gone"


def test_tree_says_what_each_file_is(tree: dict[str, str]) -> None:
    assert not [path for path, comment in tree.items() if not comment]


def test_every_dependency_has_its_reason(readme: str, pyproject: dict[str, Any]) -> None:
    rows = re.findall(r"^\|([^|\n]+)\|([^|\n]+)", section(readme, "Dependencies"), flags=re.MULTILINE)
    reasons = {name: reason.strip() for cell, reason in rows for name in re.findall(r"`([^`]+)`", cell)}
    project = pyproject["project"]
    needed = {requirement_name(need) for need in project["dependencies"]}
    known = needed | {requirement_name(need) for need in project["optional-dependencies"]["dev"]}
    named = {requirement_name(name) for name in reasons}
    assert needed - named == set(), "dependencies without a reason in README.md"
    assert named - known == set(), "README.md explains what pyproject.toml does not ask for"
    assert all(reasons.values())


def requirement_name(requirement: str) -> str:
    """`ray[serve]>=2.55,<3` is `ray`."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower()


def test_a_tree_may_be_indented_or_flat() -> None:
    indented = (
        "engine/  one GPU\n  memory/  the pool\n    pool.py  its door\n  core.py  the step\nMakefile  x\n"
    )
    assert tree_paths(indented) == {
        "engine/": "one GPU",
        "engine/memory/": "the pool",
        "engine/memory/pool.py": "its door",
        "engine/core.py": "the step",
        "Makefile": "x",
    }
    assert tree_paths("engine/memory/pool.py   its door") == {"engine/memory/pool.py": "its door"}
