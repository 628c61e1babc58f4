#!/usr/bin/env bash
# From a fresh checkout to finished pictures: installs Darkroom into .venv, then runs `darkroom demo` with the
# arguments given here (`--keep` leaves the service up).
set -euo pipefail
cd "$(dirname "$0")/.."
deploy/environment.sh server,worker
exec .venv/bin/darkroom demo "$@"
