"""Imports programs that are in no package, from `benchmarks/` and `scripts/`."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from tests.support import REPOSITORY


def load_program(path: str) -> ModuleType:
    """The module of a file of the repository. What it imports may stand beside it."""
    file = REPOSITORY / path
    spec = importlib.util.spec_from_file_location(f"program_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent))
    return module
