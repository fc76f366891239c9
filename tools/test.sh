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
cores="$(getconf _NPROCESSORS_ONLN)"
workers=(-n "$((cores < 4 ? cores : 4))" --dist loadfile)  # most tests keep one core busy; daemons want to be alone
if [ "${1:-}" = "--all" ]; then
    tier=() workers=()
    shift
fi

if [ $# -gt 0 ]; then
    workers=()
else
    echo "== ruff check";           "$PYTHON" -m ruff check
    echo "== ruff format --check";  "$PYTHON" -m ruff format --check
    echo "== mypy";                 "$PYTHON" -m mypy
    echo "== lint-imports";         lint-imports --no-logo
fi
options=(-ra ${tier[@]+"${tier[@]}"} ${workers[@]+"${workers[@]}"} "$@")  # an empty array is unset to bash 3
echo "== pytest ${options[*]}"
exec "$PYTHON" -m pytest "${options[@]}"
