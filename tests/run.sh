#!/usr/bin/env bash
# The tests, on a clean checkout: makes .venv if there is none.
#
#     bash tests/run.sh                 the fast tier, at most 15 minutes on two cores
#     bash tests/run.sh --full          everything
#     bash tests/run.sh -k lanes -x     further arguments go to pytest
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/install.sh"
cd "$root"
tier=(-m "not full")
if [ "${1:-}" = --full ]; then
    tier=()
    shift
fi
# One thread a rank: the ranks of a test share the cores. No bytecode and no cache: a checkout stays as it was.
export OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1
exec python -m pytest -q -p no:cacheprovider --durations=15 "${tier[@]}" "$@" tests
