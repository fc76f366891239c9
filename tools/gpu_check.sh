#!/usr/bin/env bash
# Asks a GPU everything: bash tools/gpu_check.sh [part ...] [--budget SECONDS] [--bars] [--wheels FOLDER]; --help says more.
# Installs nothing: it takes the first Python 3.11 or 3.12 that has a torch, and this checkout as it lies here.
#
#   ESOLM_PYTHON   the Python to use; default: that of the active environment, of .venv, or on PATH
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
here="$PWD"
python=""
for candidate in ${ESOLM_PYTHON:-"${VIRTUAL_ENV:-.venv}/bin/python" python3 python3.12 python3.11 python}; do
    if "$candidate" -c 'import importlib.util as u, sys; sys.exit(not ((3, 11) <= sys.version_info[:2] <= (3, 12) and u.find_spec("torch")))' 2>/dev/null; then
        python="$candidate"
        break
    fi
done
if [ -z "$python" ]; then
    echo "error: no Python 3.11 or 3.12 with torch found; install a CUDA build of torch, or name one: ESOLM_PYTHON=python3.12 bash $0" >&2
    exit 2
fi
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" tools/gpu_check.py "$@"
