#!/usr/bin/env bash
# Re-pin the dependencies: versions only (no hashes, no index addresses, no paths).
set -euo pipefail
cd "$(dirname "$0")/.."
uv=${UV:-${VENV:-.venv}/bin/uv}
for accel in cpu cuda; do
  # A local CPU wheel of torch must be seen for cpu and must not be for cuda.
  unset UV_FIND_LINKS UV_TORCH_BACKEND
  if [ "$accel" = cpu ]; then
    if [ -n "${PIP_FIND_LINKS:-}" ]; then export UV_FIND_LINKS=$PIP_FIND_LINKS; else export UV_TORCH_BACKEND=cpu; fi
  fi
  "$uv" pip compile -q --no-header --no-annotate --no-emit-index-url --python-version 3.11 \
    --python-platform x86_64-manylinux_2_28 --extra "$accel" --extra test pyproject.toml -o "constraints/$accel.txt"
done
