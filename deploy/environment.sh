#!/usr/bin/env bash
# Makes .venv in the checkout and installs Darkroom with the extras named by the argument (`server,worker`) into it,
# at exactly the versions of constraints.txt. What is already installed that way is left alone.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=$1

say() { printf '%s\n' "$*" >&2; }

# A version manager's shim may exist without the Python behind it, and Debian ships python3 without venv: so each
# candidate is asked, not only found. For a Python newer than these, Ray and others of constraints.txt have no wheels.
find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11; do
        if [[ -n $candidate ]] && "$candidate" -c '
import sys, venv, ensurepip
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    say "Darkroom needs Python 3.11, 3.12, 3.13 or 3.14 with its venv module, and none was found."
    say "On Debian or Ubuntu: apt-get install python3 python3-venv. Elsewhere: set PYTHON to the interpreter to use."
    return 1
}

stamp=.venv/.installed-$extras
if [[ -x .venv/bin/python && -f $stamp ]] && cat pyproject.toml constraints.txt | cmp -s - "$stamp"; then
    exit 0
fi

started=$SECONDS
if [[ ! -x .venv/bin/python ]]; then
    python=$(find_python)
    say "Creating .venv with $("$python" --version) …"
    "$python" -m venv .venv
fi
say "Installing darkroom[$extras]; the first time this takes a few minutes …"
# Editable, so that the next `git pull` is run and not a copy of the code as it is now.
.venv/bin/python -m pip install --quiet --no-input --disable-pip-version-check \
    --constraint constraints.txt --editable ".[$extras]"
cat pyproject.toml constraints.txt >"$stamp"
say "Installed in $((SECONDS - started)) s."
