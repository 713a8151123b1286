#!/usr/bin/env bash
# Runs the light tests (no torch, no kernel) on the other supported Pythons that this machine has.
#
#   scripts/test_other_pythons.sh               3.12 and 3.13
#   scripts/test_other_pythons.sh 3.13 3.14     these
#   PYTEST_ARGS="-x" scripts/test_other_pythons.sh
#
# Each has an environment of its own, .venv-3.12 and so on, made once. A Python that is not here is
# skipped in a line; a failing test fails the script, after all of them have run.
set -euo pipefail
cd "$(dirname "$0")/.."

# Beside what the package itself depends on, less what the light tests do without.
packages=(nest-asyncio nest-asyncio2 uvloop httpx hypothesis pytest anyio)
heavy="torch transformers"

# Prints the path of a Python of that version that really runs: a shim of pyenv may not.
find_python() {
  local candidate shim
  shim=$(command -v "python$1" || true)
  for candidate in {"${PYENV_ROOT:-$HOME/.pyenv}","${shim%/shims/*}"}/versions/"$1"*/bin/python $(type -aP "python$1"); do
    if [ "$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$1" ]; then
      echo "$candidate"
      return
    fi
  done
  return 1
}

# The pip of the environment $1, which says nothing unless it fails.
install() {
  local python=$1/bin/python
  shift
  "$python" -m pip install --quiet --quiet --disable-pip-version-check --no-input "$@"
}

dependencies() {
  "$1" - $heavy <<'PYTHON'
import re, sys, tomllib
with open("pyproject.toml", "rb") as file:
    wanted = tomllib.load(file)["project"]["dependencies"]
print(*(each for each in wanted if re.match(r"[\w.-]+", each)[0] not in sys.argv), sep="\n")
PYTHON
}

make_environment() {
  local folder=$1 python=$2 recipe needed
  recipe=$(cat constraints.txt pyproject.toml "$0" | cksum)
  if [ "$(cat "$folder/.recipe" 2>/dev/null)" != "$recipe" ]; then
    [ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
    mapfile -t needed < <(dependencies "$python")
    install "$folder" -c constraints.txt "${needed[@]}" "${packages[@]}"
    install "$folder" --no-deps -e .
    echo "$recipe" >"$folder/.recipe"
  fi
}

[ $# -gt 0 ] || set -- 3.12 3.13
failed=()
for version in "$@"; do
  if ! python=$(find_python "$version"); then
    echo "Python $version: not on this machine, skipped"
    continue
  fi
  echo "Python $version: the light tests"
  make_environment ".venv-$version" "$python"
  # shellcheck disable=SC2086 # PYTEST_ARGS is meant to be split
  ".venv-$version/bin/python" -m pytest -m light -q -p no:cacheprovider ${PYTEST_ARGS:-} || failed+=("$version")
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "The light tests failed on Python ${failed[*]}" >&2
  exit 1
fi
