#!/usr/bin/env bash
# The tests, on a clean checkout: makes .venv if there is none.
#
#     bash tests/run.sh --quick         the inner tier, of every module something: at most two minutes on two cores
#     bash tests/run.sh                 what a change must pass: at most 15 minutes
#     bash tests/run.sh --full          everything; .ci/run checks formatting and types as well
#     bash tests/run.sh -k lanes -x     further arguments go to pytest
#
# A test leaves a tier by its marker, `slow` or `full` (pyproject.toml).
set -euo pipefail
extras=test,dev
source "$(dirname "${BASH_SOURCE[0]}")/../launch/install.sh"
cd "$root"
tier="not full"
case "${1:-}" in
    --quick) tier="not full and not slow" && shift ;;
    --full) tier="" && shift ;;
esac
# One thread per rank: the ranks of a test share the cores. No bytecode and no cache: a checkout stays as it was.
# Two processes, each with files of its own: most tests start programs and wait for them.
export OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1
exec python -m pytest -q -p no:cacheprovider -n 2 --dist loadfile --durations=15 -m "$tier" "$@"
