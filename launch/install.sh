# Sourced by launch/quickstart.sh, tests/run.sh and .ci/run: makes .venv beside this folder and installs the pinned packages
# into it, with the extras of setup.py that $extras names. Once, and again when setup.py or constraints.txt have changed.
# PYTHON names another interpreter than python3. Afterwards `python` is the environment's.

# Run a command in a process group of its own: a signal to this script alone, as `docker stop` sends it, ends it as well.
attended() {
    local child number code=0 stopped=
    set -m
    "$@" &
    child=$!
    set +m
    for number in 1 2 15; do trap "stopped=$number; kill -TERM -- -$child 2>/dev/null || true" "$number"; done
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do wait "$child" || code=$?; done # a signal ends `wait` first
    trap - 1 2 15
    [ -z "$stopped" ] || exit $((128 + stopped))
    return "$code"
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
stamp=$(cat "$root/setup.py" "$root/constraints.txt" | sha256sum | cut -d' ' -f1)
installed="$root/.venv/installed-${extras:-none}"
if [ "$(cat "$installed" 2>/dev/null)" != "$stamp" ]; then
    python_for_venv=${PYTHON:-python3}
    if ! "$python_for_venv" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "error: $python_for_venv is $("$python_for_venv" --version 2>&1); Python 3.10 or newer is needed (set PYTHON)" >&2
        exit 2
    fi
    echo "installing into $root/.venv ..."
    [ -x "$root/.venv/bin/python" ] || attended "$python_for_venv" -m venv "$root/.venv"
    pip=(attended "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check)
    # torch before deepspeed: left to themselves, the latter's requirements take the newest torch there is.
    "${pip[@]}" "$(grep '^torch==' "$root/constraints.txt")" numpy -c "$root/constraints.txt"
    "${pip[@]}" -e "$root${extras:+[$extras]}" -c "$root/constraints.txt"
    echo "$stamp" > "$installed"
fi
export PATH="$root/.venv/bin:$PATH"
