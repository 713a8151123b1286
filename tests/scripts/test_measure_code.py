"""What `make measure` counts."""

from __future__ import annotations

import ast
import textwrap

import pytest

from tests.programs import load_program

pytestmark = pytest.mark.light
measure_code = load_program("scripts/measure_code.py")


def parse(source: str) -> ast.Module:
    return ast.parse(textwrap.dedent(source))


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("def f(): return 1", 1),
        ('def f():\n    """Only this."""', 0),
        ('def f():\n    """Two\n    lines."""\n    x = 1\n\n    # why\n    return x', 4),
        ("def f():\n    @g\n    def h(): ...\n    return h", 3),
        ("async def f(\n    a: int,\n) -> None:\n    return (\n        a\n    )", 3),
    ],
)
def test_body_lines(source: str, lines: int) -> None:
    assert measure_code.body_lines(parse(source).body[0]) == lines


def test_functions() -> None:
    bodies = [f"def f{n}():\n" + "    x = 1\n" * n for n in range(1, 11)]
    assert measure_code.functions({"a.py": parse("\n".join(bodies))}).figure == "5 / 9 / 10"


def test_classes() -> None:
    sources = {f"{n}.py": parse("class A:\n" + "    x = 1\n" * (n - 1)) for n in (250, 251)}
    assert measure_code.classes(sources).figure == "1 (251.py A: 251 lines)"


def test_code_lines() -> None:
    source = '''
        """About the module."""

        import os  # counts
        # does not

        class A:
            """Nor

            does this."""

            text = """But
            this does"""
    '''
    assert measure_code.code_lines(textwrap.dedent(source)) == 4


def test_any() -> None:
    source = "from typing import Any\nimport typing\nx: Any = 1\ny: list[typing.Any] = []  # Any\n"
    assert measure_code.any_names({"a.py": ast.parse(source)}, 4).figure == "500.0 (2)"
    assert measure_code.any_words({"a.py": source}).figure == "1000.0 (4)"


def test_not_mirrored() -> None:
    package = dict.fromkeys(
        ["serving_kit/__init__.py", "serving_kit/a.py", "serving_kit/b/c.py", "serving_kit/b/d.py"]
    )
    tests = dict.fromkeys(["tests/test_a.py", "tests/b/test_c.py", "tests/test_d.py"])
    assert measure_code.not_mirrored(package, tests).places == ["serving_kit/b/d.py"]


def test_test_names() -> None:
    tree = parse("def test_a(): ...\nclass T:\n    def test_abc(self): ...\ndef helper_with_a_name(): ...")
    assert measure_code.test_names({"tests/test_x.py": tree}).figure == "6 / 8"


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("from tests.a.test_x import helper", 1),
        ("from tests.a import test_x", 1),
        ("from . import test_x", 1),
        ("from .test_x import helper", 1),
        ("import tests.a.test_x", 1),
        ("from tests.support import until", 0),
        ("from tests.a import support", 0),
    ],
)
def test_cross_imports(line: str, number: int) -> None:
    tests = {"tests/a/test_x.py": parse(""), "tests/a/test_y.py": parse(line)}
    assert measure_code.cross_imports(tests).figure == str(number)


@pytest.mark.parametrize(
    ("line", "number"),
    [
        ("server._queue", 1),
        ("server.batcher._queue.clear()", 1),
        ("from serving_kit.batching import _LIMIT", 1),
        ("monkeypatch.setattr('serving_kit.batching._LIMIT', 1)", 1),
        ("monkeypatch.setattr(batching, '_LIMIT', 1)", 1),
        ("self._queue", 0),
        ("sys._current_frames()", 0),
        ("server.__class__", 0),
        ("server._repr_mimebundle_()", 0),
    ],
)
def test_private_reach(line: str, number: int) -> None:
    package = {
        "serving_kit/a.py": parse(
            "_LIMIT = 3\nclass A:\n    def f(self): self._queue = []\n    def _repr_mimebundle_(self): ..."
        )
    }
    assert measure_code.private_reach(package, {"tests/test_x.py": parse(line)}).figure == str(number)


def test_working_tree() -> None:
    names = [each.name for each in measure_code.measure(measure_code.working_tree())]
    assert len(names) == len(set(names)) == 9
