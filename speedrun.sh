#!/usr/bin/env bash
# From a fresh clone to a vanilla and a synaptic model trained side by side. See `bash speedrun.sh --help`.

set -euo pipefail

case " $* " in
*" --help "* | *" -h "*)
    cat <<'TEXT'
usage: bash speedrun.sh [flags of scripts.speedrun]

Makes .venv at the root of the repository where needed (about 3 GB of packages), then trains a vanilla and a synaptic
model side by side on the same data, compares them, teaches the synaptic one to chat and prints the command to talk to
it. The last line of output is one JSON object: {"vanilla": {...}, "synaptic": {...}, "chat": {...}}, the first two with
val_bpb, tok_per_s, params, seconds and checkpoint.

environment:
  SPEEDRUN_DEPTH=N     layers of both models
  SPEEDRUN_MINUTES=N   time for everything after installation (default 9.5)
  SPEEDRUN_DATA=PATH   a folder of parquet shards, or a text file or folder (default: the embedded demo corpus)
  NANOCHAT_BASE_DIR    where artefacts live (default ~/.cache/bio_inspired_nanochat)

After the set-up `.venv/bin/python -m scripts.speedrun --help` lists the flags.
TEXT
    exit 0
    ;;
esac

echo "speedrun: installs about 3 GB of Python packages (torch with CUDA among them) into .venv on its first run (a few minutes), then trains two models and teaches one to chat (10 minutes at most)"
if [ -n "${SPEEDRUN_DATA:-}" ]; then
    case $SPEEDRUN_DATA in /* | "~"*) ;; *) export SPEEDRUN_DATA="$PWD/$SPEEDRUN_DATA" ;; esac
fi
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/env.sh"
cd -- "$repo"
exec "$venv_python" -m scripts.speedrun "$@"
