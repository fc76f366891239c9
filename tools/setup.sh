# Sourced by tools/test.sh and tools/quickstart.sh, from any folder: leaves the shell in the repository root, with $PYTHON a
# Python that has this package installed.
#
#   ESOLM_EXTRAS   what to install besides the package itself: train (default) or dev
#   ESOLM_VENV     the virtual environment to use; default: the active one, else .venv in the repository, made if missing
#   ESOLM_PYTHON   the Python that .venv is made with; default: the first 3.12 or 3.11 found
#
# Quick when nothing changed: a stamp in the environment holds the hash of pyproject.toml that was installed.

esolm_extras="${ESOLM_EXTRAS:-train}"
esolm_venv="${ESOLM_VENV:-${VIRTUAL_ENV:-}}"
case "$esolm_venv" in ""|/*) ;; *) esolm_venv="$PWD/$esolm_venv" ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
esolm_venv="${esolm_venv:-$PWD/.venv}"

if [ ! -x "$esolm_venv/bin/python" ]; then
    esolm_python=""
    for candidate in ${ESOLM_PYTHON:-python3 python3.12 python3.11 python}; do
        # run it: a version manager's stand-in may be on PATH without a Python behind it
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            esolm_python="$candidate"
            break
        fi
    done
    if [ -z "$esolm_python" ]; then
        echo "error: no Python 3.11 or 3.12 found; install one, or name it: ESOLM_PYTHON=python3.12 bash $0" >&2
        exit 1
    fi
    echo "== making $esolm_venv with $("$esolm_python" --version)"
    # a torch that the machine already has is used: it is the one built for its GPUs
    esolm_site=""
    if "$esolm_python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'; then
        esolm_site="--system-site-packages"
    fi
    if ! "$esolm_python" -m venv $esolm_site "$esolm_venv" 2>/dev/null; then
        # some distributions ship Python without the part of venv that brings pip
        rm -rf "$esolm_venv"
        "$esolm_python" -m venv $esolm_site --without-pip "$esolm_venv" || exit 1
        "$esolm_python" -m pip --python "$esolm_venv/bin/python" install -q pip || exit 1
    fi
fi

PYTHON="$esolm_venv/bin/python"
esolm_stamp="$esolm_venv/.esolm-installed-$esolm_extras"
esolm_hash="$("$PYTHON" -c 'import hashlib, os; print(hashlib.sha256(open("pyproject.toml", "rb").read() + os.getcwd().encode()).hexdigest())')" || exit 1
if [ "$(cat "$esolm_stamp" 2>/dev/null)" != "$esolm_hash" ]; then
    if ! "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'; then
        echo "== installing torch"
        "$PYTHON" -m pip install -q torch==2.13.0 || exit 1
    fi
    echo "== installing esolm-megatron[$esolm_extras]"
    "$PYTHON" -m pip install -q -e ".[$esolm_extras]" || exit 1
    echo "$esolm_hash" > "$esolm_stamp"
fi
export PATH="$esolm_venv/bin:$PATH"
