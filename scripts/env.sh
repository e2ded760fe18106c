#!/usr/bin/env bash
# The Python environment of this repository: `.venv` at its root, made, repaired or brought up to date.
# speedrun.sh and tests/run.sh source this file (it sets $repo and $venv_python); run alone it only sets up.
# Where packages come from is left to the user's own pip and uv configuration.

set -euo pipefail

repo=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$repo/.venv
venv_python=$venv/bin/python

# With a closed standard input the next opened file would become descriptor 0 of every child.
{ : 3<&0; } 2>/dev/null || exec </dev/null

note() { printf 'setup: %s\n' "$*"; }
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

is_python() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    local name
    for name in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.14 python; do
        if is_python "$name"; then
            "$name" -c 'import sys; print(sys.executable)'
            return
        fi
    done
}

make_venv() {
    local base
    if [ -e "$venv" ] || [ -L "$venv" ]; then
        note "$venv has no working Python 3.11 or later: making it anew"
        rm -rf -- "$venv"
    fi
    base=$(find_python)
    if command -v uv >/dev/null 2>&1; then
        note "making .venv with uv"
        uv venv --quiet --python "${base:->=3.11}" "$venv" && return
        note "uv could not make it: trying venv"
    fi
    [ -n "$base" ] || fail "no Python 3.11 or later was found: install one (on Debian: apt install python3 python3-venv), or name it in PYTHON=/path/to/python"
    "$base" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
        fail "$base cannot make virtual environments: install the Debian package python3-venv (apt install python3-venv), or install uv"
    note "making .venv with $base"
    "$base" -m venv "$venv" || fail "$base -m venv $venv failed: see the lines above"
}

run_pip() {
    "$venv_python" -m pip --version >/dev/null 2>&1 || "$venv_python" -m ensurepip >/dev/null 2>&1 ||
        fail "$venv has no pip and ensurepip cannot add it: install uv, or remove .venv and run again"
    "$venv_python" -m pip --disable-pip-version-check "$@"
}

# Sets $uv, once, to a uv that can serve (the user's, or one installed into .venv), or to nothing for pip.
choose_installer() {
    [ "$uv" = unknown ] || return 0
    uv=$(command -v uv || true)
    [ -z "$uv" ] || return 0
    if run_pip config list 2>/dev/null | grep -Eq 'index-url|no-index'; then
        note "using pip, because your pip configuration names an index"
    elif [ -x "$venv/bin/uv" ] || run_pip install --quiet --no-input -c "$repo/constraints.txt" uv; then
        uv=$venv/bin/uv
    else
        note "uv is not available: using pip"
    fi
}

install() {
    if [ -n "$uv" ]; then
        "$uv" pip install --python "$venv_python" "$@"
    else
        [ -t 1 ] || set -- --progress-bar off "$@"
        run_pip install --no-input "$@"
    fi
}

# Prints one digest for the packages (what is asked for and what is there) and one for the Rust extension.
DIGESTS='
import hashlib, pathlib, sys, sysconfig
repo = pathlib.Path(sys.argv[1])
def digest(*parts, also=""):
    total = hashlib.sha256(f"{sys.version} {repo} {also}".encode())
    for part in parts:
        folder = repo / part
        for path in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
            if path.is_file():
                total.update(f"{path.relative_to(repo)} {hashlib.sha256(path.read_bytes()).hexdigest()}".encode())
    return total.hexdigest()
installed = sorted(path.name for path in pathlib.Path(sysconfig.get_path("purelib")).glob("*.dist-info"))
installed = [name for name in installed if not name.startswith("bio_inspired_nanochat-")]
packages = digest("pyproject.toml", "constraints.txt", "scripts/env.sh", also=installed)
print(packages, digest("pyproject.toml", "Cargo.toml", "rust_src"))
'

# Writes the requirement lists out of pyproject.toml, and puts the repository on the path of .venv.
PREPARE='
import pathlib, sys, sysconfig, tomllib
repo, venv = map(pathlib.Path, sys.argv[1:])
table = tomllib.loads((repo / "pyproject.toml").read_text())
project = table["project"]
packages = project["dependencies"] + project["optional-dependencies"]["dev"]
(venv / "setup-packages.txt").write_text("\n".join(packages) + "\n")
(venv / "setup-text-only.txt").write_text("\n".join(table["tool"]["bio-inspired-nanochat"]["text-only"]) + "\n")
pathlib.Path(sysconfig.get_path("purelib"), "bio_inspired_nanochat_source.pth").write_text(f"{repo}\n")
'

install_packages() {
    local fresh=()
    if [ -e "$venv/setup-unfinished" ]; then
        note "the last set-up was cut off: installing every package again"
        fresh=(--force-reinstall)
    fi
    : >"$venv/setup-unfinished"
    "$venv_python" -I -c "$PREPARE" "$repo" "$venv"
    choose_installer
    note "installing the packages of pyproject.toml as pinned in constraints.txt (about 3 GB on a first run, a few minutes)"
    local packages=(${fresh[@]+"${fresh[@]}"} -c "$repo/constraints.txt" -r "$venv/setup-packages.txt")
    if ! install "${packages[@]}"; then
        [ -n "$uv" ] || fail "pip could not install the packages: see the lines above, then run this again"
        note "uv could not install the packages: trying pip"
        uv=
        install "${packages[@]}" || fail "neither uv nor pip could install the packages: see the lines above, then run this again"
    fi
    install ${fresh[@]+"${fresh[@]}"} --no-deps -c "$repo/constraints.txt" -r "$venv/setup-text-only.txt" ||
        fail "the packages of setup-text-only.txt could not be installed: see the lines above, then run this again"
    rm -f -- "$venv/setup-unfinished"
}

have_extension() {
    local file
    for file in "$repo"/bio_inspired_nanochat/_rust*.so; do [ -e "$file" ] && return; done
    return 1
}

# Without a toolchain, or when the build fails, everything still runs: Python falls back to PyTorch.
build_extension() {
    rm -f -- "$repo"/bio_inspired_nanochat/_rust*.so
    if ! cargo --version >/dev/null 2>&1; then
        note "no Rust toolchain (cargo) was found: going on without the Rust extension, PyTorch does its work"
        return 0
    fi
    note "building the Rust extension (less than a minute)"
    choose_installer
    if PATH=$venv/bin:$PATH install --force-reinstall --no-deps --no-build-isolation -e "$repo" >"$venv/setup-rust.log" 2>&1; then
        printf '%s\n' "$1" >"$venv/setup-rust-digest"
    else
        tail -n 15 "$venv/setup-rust.log" >&2
        note "the Rust extension was not built (see .venv/setup-rust.log): going on without it, PyTorch does its work"
    fi
}

digests() { "$venv_python" -I -c "$DIGESTS" "$repo"; }

# Digests are written last, so that whatever was cut off is done again.
setup() {
    local found uv=unknown
    is_python "$venv_python" || make_venv
    found=$(digests)
    if [ "$(cat "$venv/setup-packages-digest" 2>/dev/null)" != "${found% *}" ]; then
        install_packages
        found=$(digests)
        printf '%s\n' "${found% *}" >"$venv/setup-packages-digest"
        note "the packages are in place"
    fi
    if ! have_extension || [ "$(cat "$venv/setup-rust-digest" 2>/dev/null)" != "${found#* }" ]; then
        build_extension "${found#* }"
    fi
}

setup
