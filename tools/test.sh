#!/usr/bin/env bash
# Every check of this repository, after setting up what they need: bash tools/test.sh [--all] [arguments for pytest ...]
#
#   --all   the slow tests and those that need SLURM's daemons too
#
# Stops at the first step that fails. With arguments for pytest, a file or -k, only pytest runs.
set -euo pipefail

export ESOLM_EXTRAS=dev
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
if ! command -v nvidia-smi > /dev/null; then
    export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
fi

tier=(-m "not slow and not slurm")
if [ "${1:-}" = "--all" ]; then
    tier=()
    shift
fi

if [ $# -eq 0 ]; then
    echo "== ruff check";           "$PYTHON" -m ruff check
    echo "== ruff format --check";  "$PYTHON" -m ruff format --check
    echo "== mypy";                 "$PYTHON" -m mypy
    echo "== lint-imports";         lint-imports --no-logo
fi
echo "== pytest ${tier[*]} $*"
exec "$PYTHON" -m pytest "${tier[@]}" "$@"
