#!/bin/sh
# The peers have a virtual environment of their own (.venv-bench), so that their dependencies are not ours.
set -eu
cd "$(dirname "$0")/.."
stamp=.venv-bench/.installed
if [ -e "$stamp" ] && [ "$stamp" -nt benchmarks/requirements.txt ] && [ "$stamp" -nt constraints.txt ]; then
  exit 0
fi
test -x .venv-bench/bin/python || "${PYTHON:-python3}" -m venv .venv-bench
.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check \
  -c constraints.txt -r benchmarks/requirements.txt
touch "$stamp"
