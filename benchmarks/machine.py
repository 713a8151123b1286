"""Where a run was made: the processor, the system, and the versions of everything that was measured."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from programs import PROGRAMS, Program

_SHARED = ("starlette", "uvicorn", "torch", "transformers")  # versions of the group of the guide
_SCRIPT = (
    "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
)


def machine(programs: Sequence[Program]) -> dict[str, Any]:
    """What results.json says about the machine and the packages."""
    found = {"serving-kit": importlib.metadata.version("serving-kit")}
    for program in programs:
        if program.distribution and program.python.exists():
            found |= _versions(program, [program.distribution])
    if PROGRAMS["guide"].python.exists():
        found |= _versions(PROGRAMS["guide"], _SHARED)
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": found,
    }


def _versions(program: Program, names: Sequence[str]) -> Mapping[str, str]:
    """Of packages in the environment of a program."""
    command = [str(program.python), "-c", _SCRIPT, *names]
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    versions: Mapping[str, str] = json.loads(done.stdout)
    return versions


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
