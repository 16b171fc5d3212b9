"""Tracked text that would tie the repository to one machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

# A package index is the business of each machine's pip configuration.
REGISTRY_HOSTS = re.compile(
    r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|pypi\.nvidia\.com|npmjs\.(?:org|com)"
)
CHECKOUT_PATHS = re.compile(r"(?<![\w.$}~/-])/(?:Users|work|home/(?!ray\b)\w+|root(?!/\.cache))/")
MERGE_MARKERS = re.compile(r"^(?:<<<<<<<|>>>>>>>) ", re.MULTILINE)


@pytest.fixture(scope="module")
def texts(repository_files: list[Path], root: Path) -> dict[Path, str]:
    """Every tracked file as text."""
    return {path: (root / path).read_text(errors="replace") for path in repository_files}


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (REGISTRY_HOSTS, "a package registry's host: leave it to pip's configuration"),
        (CHECKOUT_PATHS, "a path of one developer's machine"),
        (MERGE_MARKERS, "an unresolved merge"),
    ],
    ids=["registry-hosts", "checkout-paths", "merge-markers"],
)
def test_no_tracked_file_has(pattern: re.Pattern[str], why: str, texts: dict[Path, str]) -> None:
    hits = [
        f"{path}:{text.count(chr(10), 0, match.start()) + 1}: {match.group()}"
        for path, text in texts.items()
        for match in pattern.finditer(text)
    ]
    assert not hits, why


def test_this_checkout_is_named_nowhere(texts: dict[Path, str], root: Path) -> None:
    assert not [str(path) for path, text in texts.items() if f"{root.resolve()}/" in text]


def test_the_patterns_match_what_they_should() -> None:
    assert CHECKOUT_PATHS.search("open('/" + "work/main/x')")
    assert CHECKOUT_PATHS.search("/" + "home/me/ballonet/")
    assert not CHECKOUT_PATHS.search("/home/ray/anaconda3/ ~/work/x https://host/work/x")
    assert REGISTRY_HOSTS.search("https://pypi" + ".org/simple")


def test_scripts_are_executable_and_strict(repository_files: list[Path], root: Path) -> None:
    scripts = [path for path in repository_files if (root / path).read_bytes()[:14] == b"#!/usr/bin/env"]
    assert scripts
    for path in scripts:
        assert (root / path).stat().st_mode & 0o111, f"{path} is not executable"
        if b"bash" in (root / path).read_bytes().split(b"\n", 1)[0]:
            assert "set -euo pipefail" in (root / path).read_text(), f"{path} goes on after a failure"
