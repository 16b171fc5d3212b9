#!/usr/bin/env bash
# make-venv.sh PYTHON VENV: a virtual environment with Ballonet (editable) and its development tools.
# A PYTHON that already has torch with CUDA keeps its own torch, triton and CUDA bindings: the new
# environment sees them and pip is held to their versions. Elsewhere constraints.txt decides.
# An environment that works is brought up to date; a broken one is made anew.
set -euo pipefail

say() { printf 'make-venv: %s\n' "$*"; }
die() {
    printf 'make-venv: %s\n' "$@" >&2
    exit 1
}

[[ $# -eq 2 ]] || die "usage: make-venv.sh PYTHON VENV"
wanted=$1
venv=$2
cd "$(dirname "${BASH_SOURCE[0]}")/.."

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# A name on PATH is not yet an interpreter (pyenv's shims exist for versions that are not active), so
# every candidate has to run.
find_python() {
    local candidate
    for candidate in "$wanted" python3.12 python3.11 python3.13; do
        if is_recent "$candidate"; then
            python=$(command -v "$candidate")
            [[ $candidate = "$wanted" ]] || say "$wanted is no Python 3.11 or newer: taking $python"
            return
        fi
    done
    die "Ballonet needs Python 3.11 or newer; $wanted $("$wanted" --version 2>/dev/null || echo "does not run")" \
        "and neither python3.12, python3.11 nor python3.13 is there. Install one, or: make PYTHON=/path/to/python3"
}

# Its pip works, its Python is recent, and it sees the host's torch if that is the one to keep.
is_usable() {
    is_recent "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1 || return 1
    [[ -z $pins ]] && return
    local seen
    seen=$("$venv/bin/python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' 2>/dev/null)
    [[ $seen = "${pins%%$'\n'*}" ]]
}

# Prints "name==version" of torch and of what has to stay with it, or nothing without a CUDA build.
host_pins() {
    "$python" - <<'PY' 2>/dev/null || true
from importlib import metadata

import torch

if torch.version.cuda:
    for name in ("torch", "triton", "cuda-python", "cuda-bindings", "cuda-core"):
        try:
            print(f"{name}=={metadata.version(name)}")
        except metadata.PackageNotFoundError:
            pass
PY
}

make_environment() {
    local flags=(--clear)
    [[ -z $pins ]] || flags+=(--system-site-packages)
    if [[ -e $venv && ! -e $venv/pyvenv.cfg && -n $(ls -A "$venv") ]]; then
        die "$venv exists and is not a virtual environment: move it away, or name another"
    fi
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        die "$python cannot make virtual environments: ensurepip is missing." \
            "On Debian and Ubuntu: apt-get install $("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    fi
    say "making $venv with $("$python" --version) ($python)"
    "$python" -m venv "${flags[@]}" "$venv"
    [[ -z $pins ]] || see_parent_environment
}

# --system-site-packages shows the base interpreter's packages. When PYTHON is itself a virtual
# environment, as in many GPU images, its torch lies elsewhere: a path file adds that folder.
see_parent_environment() {
    "$python" - "$venv" <<'PY'
import pathlib
import sys
import sysconfig

if sys.prefix != sys.base_prefix:
    site = next(pathlib.Path(sys.argv[1]).glob("lib/python*/site-packages"))
    folders = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (site / "parent_environment.pth").write_text("\n".join(folders) + "\n")
PY
}

install() {
    local constraints=$venv/constraints.txt
    if [[ -n $pins ]]; then
        say "keeping the host's $(tr '\n' ' ' <<<"$pins")"
        grep -vE '^(torch|triton|cuda-[a-z]+)==' constraints.txt >"$constraints"
        printf '%s\n' "$pins" >>"$constraints"
    else
        cp constraints.txt "$constraints"
    fi
    say "installing Ballonet and its dependencies (minutes the first time; log: $venv/install.log)"
    if ! "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off \
        -c "$constraints" -e '.[dev]' >"$venv/install.log" 2>&1; then
        tail -n 20 "$venv/install.log" >&2
        die "pip could not install the dependencies: above is the end of $venv/install.log." \
            "${pins:+Torch is the one of the host; it must satisfy pyproject.toml. }Without a network, point pip at a" \
            "folder of wheels: PIP_NO_INDEX=1 PIP_FIND_LINKS=/path/to/wheels make setup"
    fi
}

find_python
pins=$(host_pins)
if is_usable; then
    say "updating $venv ($("$venv/bin/python" --version))"
else
    make_environment
fi
install
say "ready: $("$venv/bin/python" -c 'from importlib.metadata import version as v; print("ballonet", v("ballonet"), "with torch", v("torch"))')"
