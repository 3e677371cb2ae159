#!/usr/bin/env bash
# From nothing to a trained, evaluated memory transformer, in about ten minutes on two CPU cores:
#
#     bash launch/quickstart.sh            the corpus is the source code of Python's standard library
#     bash launch/quickstart.sh PATH       ... or any folder of text
#
# Makes its own .venv. After an interruption the same command resumes. launch/quickstart.py describes the steps.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
exec python "$root/launch/quickstart.py" "$@"
