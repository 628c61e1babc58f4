#!/usr/bin/env bash
# Installs everything the tests need into .venv and runs the whole suite, lint, types and import contracts included.
# --long adds the big matrices; every other argument goes to pytest. Two processes share the run: half of its time
# tests wait for services that they started (-n 0: one process, whose output is not captured by another).
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONPATH

selection=(-m "not long")
arguments=()
for argument in "$@"; do
    if [[ $argument == --long ]]; then
        selection=()
        # Properties are tried on many more examples too.
        export DARKROOM_LONG=1
    else
        arguments+=("$argument")
    fi
done

deploy/environment.sh server,worker,simulator,tracing,s3,dev
# faulthandler also after pytest's own has been taken down: a crash while the process ends then says where.
export PYTHONFAULTHANDLER=1
# The long form, because bash 3.2, which macOS ships, takes an empty array for an unset variable.
exec .venv/bin/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder ${selection[@]+"${selection[@]}"} ${arguments[@]+"${arguments[@]}"}
