#!/usr/bin/env bash
# From a machine with only Python to generated text: sets up .venv, then runs tools/quickstart.py (about 5 minutes).
# Arguments go to tools/quickstart.py; its --help says which.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ESOLM_EXTRAS="${ESOLM_EXTRAS:-train}"
# shellcheck source=tools/setup.sh
source tools/setup.sh
exec "$PYTHON" tools/quickstart.py "$@"
