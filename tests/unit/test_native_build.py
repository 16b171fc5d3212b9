"""The native helper is built once, whoever starts at the same time, and missed with a clear word."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from engine.memory import native

COMPILER = native.find_compiler()
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


def works(library: native.Library | None) -> bool:
    """Whether the helper can be called."""
    table = native.CallTable()
    if library is None:
        return False
    mapper = library.quick.mapper_open(ctypes.byref(table))
    library.slow.mapper_close(mapper)
    library.quick.mapper_free(mapper)
    return True


@needs_compiler
def test_it_is_built_once(tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "ballonet"
    assert works(native.load_with(COMPILER, cache))
    (built,) = cache.iterdir()
    before = built.stat()
    assert works(native.load_with(COMPILER, cache))
    assert list(cache.iterdir()) == [built]
    assert built.stat() == before


@needs_compiler
def test_many_may_build_it_at_once(tmp_path: Path) -> None:
    program = (
        "import pathlib; from engine.memory import native\n"
        f"assert native.load_with({COMPILER!r}, pathlib.Path({str(tmp_path)!r}))"
    )
    command = [sys.executable, "-W", "error", "-c", program]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        assert process.wait(120) == 0, process.communicate()[1]
        process.communicate()
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"], "nothing half made is left"


@needs_compiler
@pytest.mark.parametrize("spoil", ["not a folder", "damaged", "no home"])
def test_a_cache_that_is_of_no_use_is_done_without(tmp_path: Path, spoil: str) -> None:
    cache: Path | None = tmp_path / "cache"
    if spoil == "not a folder":
        (tmp_path / "cache").write_text("")
    elif spoil == "damaged":
        native.load_with(COMPILER, cache)
        (built,) = (tmp_path / "cache").iterdir()
        built.unlink()  # the loaded one stays whole
        built.write_bytes(b"\x7fELF and no more")
    else:
        cache = None
    assert works(native.load_with(COMPILER, cache))


def test_a_missing_compiler_is_said_with_the_remedy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert native.load_with(None, tmp_path) is None
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "steps wait" in record.message
    assert "there is no C compiler" in record.message
    assert "apt-get install gcc" in record.message


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 1", "exit status 1"),
        ("case $1 in --version) ;; *) echo 'stdint.h: no such file' >&2; exit 1;; esac", "stdint.h: no such"),
        ("true", "No such file"),  # it says yes, and builds nothing
    ],
    ids=["broken", "no headers", "a liar"],
)
def test_a_compiler_that_fails_is_quoted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, script: str, said: str
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    assert native.load_with(str(compiler), tmp_path / "cache") is None
    (record,) = caplog.records
    assert f"{compiler} did not build the helper" in record.message
    assert said in record.message


@needs_compiler
def test_the_sources_compile_without_a_warning(tmp_path: Path) -> None:
    flags = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror", "-fsyntax-only"]
    folder = Path(native.__file__).parent
    assert {path.name for path in folder.glob("native_*")} == set(native._SOURCES)
    sources = sorted(folder.glob("native_*.c"))
    run = subprocess.run([str(COMPILER), *flags, *sources], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
