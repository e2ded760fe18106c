#!/usr/bin/env bash
# The whole test suite: bash tests/run.sh [pytest arguments]. Makes the environment first where needed.
# A later -m or -n wins, for example `bash tests/run.sh -m gpu -n 0` (some of those take all memory of the GPU) or `bash tests/run.sh -n 0 --pdb -k causality`.

set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/../scripts/env.sh"
cd -- "$repo"

bounded() {
    if command -v timeout >/dev/null 2>&1; then timeout "$@"; else shift && "$@"; fi
}

if cargo --version >/dev/null 2>&1; then
    export PYO3_PYTHON=$venv_python
    bounded 900 cargo test --quiet
    # in the profile of the extension, whose build has compiled the macros and build scripts that clippy needs, too
    if cargo clippy --version >/dev/null 2>&1; then bounded 900 cargo clippy --quiet --release --all-targets --features python -- -D warnings; fi
    if cargo fmt --version >/dev/null 2>&1; then cargo fmt --check; fi
fi

workers=()
if [ "$(getconf _NPROCESSORS_ONLN)" -ge 2 ]; then
    workers=(-n 2 --dist worksteal)
fi
export OMP_NUM_THREADS=1
exec "$venv_python" -m pytest -m "not gpu and not soak" ${workers[@]+"${workers[@]}"} "$@"
