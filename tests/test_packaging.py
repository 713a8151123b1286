"""What imports load, the public names, and whether the project's files agree with each other."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from itertools import chain

import pytest

import serving_kit
from tests.support import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def core_modules() -> list[str]:
    """What import-linter keeps free of torch, the web server and the widgets, with their submodules."""
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    [names] = (each["source_modules"] for each in contracts if each["type"] == "forbidden")
    folders = [REPOSITORY / name.replace(".", "/") for name in names]
    inner = [
        f"{name}.{file.stem}"
        for name, folder in zip(names, folders, strict=True)
        for file in folder.glob("[!_]*.py")
    ]
    return sorted([*names, *inner])


def imported_by(statement: str) -> set[str]:
    script = f"{statement}; import sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.light
def test_import_is_light() -> None:
    heavy = {"torch", "transformers", "ipywidgets", "anywidget", "starlette", "uvicorn", "numpy", "IPython"}
    assert not imported_by("import serving_kit") & heavy


@pytest.mark.light
@pytest.mark.parametrize("module", core_modules())
def test_imports_of_core_modules(module: str) -> None:
    """No web server, no torch, no widgets."""
    loaded = imported_by(f"import {module}")
    assert not loaded & {"starlette", "uvicorn", "torch", "transformers", "ipywidgets", "anywidget"}


@pytest.mark.light
def test_imports_of_served_function() -> None:
    loaded = imported_by("import serving_kit; serving_kit.serve(lambda xs: xs, port=0).stop()")
    assert not loaded & {"torch", "transformers", "ipywidgets", "anywidget", "IPython"}


@pytest.mark.light
def test_public_names() -> None:
    assert set(dir(serving_kit)) == set(serving_kit.__all__)
    for name in serving_kit.__all__:
        assert getattr(serving_kit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = serving_kit.nothing  # type: ignore[attr-defined]


def test_environment_file() -> None:
    import yaml

    project = PROJECT["project"]
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    assert environment["name"] == project["name"]
    python, pip, section = environment["dependencies"]
    assert python == f"python{project['requires-python']}"
    assert pip == "pip"
    (requirement,) = section["pip"]
    extra = re.fullmatch(r"-e \.\[(\w+)\]", requirement)
    assert extra, "versions live in pyproject.toml alone"
    assert extra[1] in project["optional-dependencies"]


def test_constraints_within_ranges() -> None:
    from packaging.requirements import Requirement

    project = PROJECT["project"]
    pins = dict(
        line.split("==")
        for line in (REPOSITORY / "constraints.txt").read_text().lower().splitlines()
        if "==" in line
    )
    wanted = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    for line in wanted:
        requirement = Requirement(line)
        if requirement.name != project["name"]:
            name = requirement.name.lower()
            pin = pins.get(name) or pins.get(name.replace("-", "_"))
            assert pin is not None, f"{name} is not pinned for development"
            assert requirement.specifier.contains(pin), f"{name}=={pin} is outside {requirement.specifier}"


@pytest.mark.light
def test_tests_import_no_other_tests() -> None:
    """What several test modules share is in `tests/support*.py`."""
    found = []
    for file in sorted((REPOSITORY / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [each.name for each in node.names] if isinstance(node, ast.Import) else []
            found += [f"{file.name}: {name}" for name in names if re.match(r"tests\.(\w+\.)*test_", name)]
    assert found == []
