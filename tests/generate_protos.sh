#!/usr/bin/env bash
# Writes the generated code of proto/, and its reference page, under a folder (default: the repository itself, where it is committed).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-.}
python=${PYTHON:-.venv/bin/python}
export PATH="$(dirname "$python"):$PATH"
"$python" -m grpc_tools.protoc -I proto \
    --python_out="$out" --mypy_out="$out" --grpc_python_out="$out" --mypy_grpc_out="$out" \
    $(cd proto && find . -name '*.proto' | sed 's|^\./||' | sort)
mkdir -p "$out/proto"
"$python" -m tests.generate_reference "$out/proto/reference.md"
