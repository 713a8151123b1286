"""Measures the shape of the code: sizes of functions and classes, `Any`, and how the tests are laid out.

    python scripts/measure_code.py                                the working tree
    python scripts/measure_code.py --commit 99e0e60               a commit beside the working tree
    python scripts/measure_code.py --commit 99e0e60 --details     and the places behind the numbers

Prints a table in Markdown. It reads the sources and imports none of them, so any commit can be measured.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import statistics
import subprocess
import tarfile
import tokenize
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, TESTS = "serving_kit", "tests"
LARGE_CLASS_LINES = 250

Sources = Mapping[str, str]  # path in the repository: text
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Measure:
    """One row of the table: a figure, and the places behind it."""

    name: str
    figure: str
    places: Sequence[str] = ()


def measure(sources: Sources) -> list[Measure]:
    """All rows for one state of the repository."""
    package = {path: ast.parse(text) for path, text in sources.items() if path.startswith(f"{PACKAGE}/")}
    tests = {path: ast.parse(text) for path, text in sources.items() if path.startswith(f"{TESTS}/")}
    lines = sum(code_lines(sources[path]) for path in package)
    return [
        Measure("files, lines of code in them", f"{len(package)}, {lines:,}"),
        functions(package),
        classes(package),
        any_names(package, lines),
        any_words({path: sources[path] for path in package}),
        not_mirrored(package, tests),
        test_names(tests),
        cross_imports(tests),
        private_reach(package, tests),
    ]


# -- the package -----------------------------------------------------------------------------------


def functions(trees: Mapping[str, ast.Module]) -> Measure:
    """Lines of the bodies of functions, methods and nested functions, without docstrings."""
    sizes = sorted(
        (body_lines(node), f"{path}:{node.lineno} {node.name}")
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, Function)
    )
    lines = [size for size, _ in sizes]
    figure = f"{quantile(lines, 0.5)} / {quantile(lines, 0.9)} / {lines[-1]}" if lines else "-"
    longest = [f"{size} {where}" for size, where in reversed(sizes[-10:])]
    return Measure("function body lines, p50 / p90 / longest", figure, longest)


def body_lines(function: Function) -> int:
    """Lines from the first statement after the docstring to the last; 0 if there is none."""
    body = function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body
    return last_line(body[-1]) - first_line(body[0]) + 1 if body else 0


def classes(trees: Mapping[str, ast.Module]) -> Measure:
    """Classes of more than `LARGE_CLASS_LINES` lines, docstrings included."""
    large = [
        (last_line(node) - first_line(node) + 1, f"{path} {node.name}")
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and last_line(node) - first_line(node) >= LARGE_CLASS_LINES
    ]
    places = [f"{where}: {size} lines" for size, where in sorted(large, reverse=True)]
    listed = f" ({'; '.join(places)})" if places else ""
    return Measure(f"classes above {LARGE_CLASS_LINES} lines", f"{len(large)}{listed}")


def any_names(trees: Mapping[str, ast.Module], lines: int) -> Measure:
    """How often the name `Any` is used, in annotations and elsewhere; imports of it do not count."""
    uses = [
        f"{path}:{node.lineno}"
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Name) and node.id == "Any")
        or (isinstance(node, ast.Attribute) and node.attr == "Any")
    ]
    return Measure("uses of `Any` per 1,000 lines of code", rate(len(uses), lines), uses)


def any_words(sources: Sources) -> Measure:
    """How often the word stands in the files, imports included, for all of their lines."""
    words = sum(len(re.findall(r"\bAny\b", text)) for text in sources.values())
    lines = sum(text.count("\n") for text in sources.values())
    return Measure("the word `Any` per 1,000 lines of text", rate(words, lines))


def rate(number: int, lines: int) -> str:
    """The number per 1,000 lines, and the number."""
    return f"{1000 * number / max(lines, 1):.1f} ({number})"


def code_lines(text: str) -> int:
    """Lines that hold code: neither blank nor only a comment or a docstring."""
    covered: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _LAYOUT:
            covered.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | Function) and ast.get_docstring(node) is not None:
            covered.difference_update(range(first_line(node.body[0]), last_line(node.body[0]) + 1))
    return len(covered)


_LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


# -- the tests -------------------------------------------------------------------------------------


def not_mirrored(package: Mapping[str, ast.Module], tests: Mapping[str, ast.Module]) -> Measure:
    """Files of the package without a test file of the same name in the same folder."""
    missing = [path for path in package if not path.endswith("/__init__.py") and mirror(path) not in tests]
    return Measure("files without a test that mirrors them", str(len(missing)), missing)


def mirror(path: str) -> str:
    """`serving_kit/a/b.py`: `tests/a/test_b.py`."""
    inside = PurePosixPath(path).relative_to(PACKAGE)
    return str(PurePosixPath(TESTS) / inside.with_name(f"test_{inside.name}"))


def test_names(trees: Mapping[str, ast.Module]) -> Measure:
    """Characters in the names of test functions."""
    names = sorted(
        {
            (len(node.name), node.name)
            for path, tree in trees.items()
            if is_test_file(path)
            for node in ast.walk(tree)
            if isinstance(node, Function) and node.name.startswith("test_")
        }
    )
    lengths = [length for length, _ in names]
    figure = f"{statistics.median_low(lengths)} / {lengths[-1]}" if lengths else "-"
    longest = [f"{length} {name}" for length, name in reversed(names[-10:])]
    return Measure("characters in a test's name, median / longest", figure, longest)


def cross_imports(trees: Mapping[str, ast.Module]) -> Measure:
    """Imports of a test file by another file of the tests."""
    found = [
        f"{path}:{node.lineno} {name}"
        for path, tree in trees.items()
        for node, name in imports(path, tree)
        if any(part.startswith("test_") for part in name.split(".")[:-1]) or is_module(name, trees)
    ]
    return Measure(
        "tests that import from other tests", str(len({at.partition(":")[0] for at in found})), found
    )


def imports(path: str, tree: ast.Module) -> Iterator[tuple[ast.stmt, str]]:
    """Every import statement and the full dotted name of what it imports."""
    folder = PurePosixPath(path).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            yield from ((node, f"{module}.{alias.name}") for alias in node.names)


def is_module(name: str, trees: Mapping[str, ast.Module]) -> bool:
    """Whether a dotted name is a test file."""
    path = f"{name.replace('.', '/')}.py"
    return path in trees and is_test_file(path)


def is_test_file(path: str) -> bool:
    """Whether pytest collects it."""
    return PurePosixPath(path).name.startswith("test_")


def private_reach(package: Mapping[str, ast.Module], tests: Mapping[str, ast.Module]) -> Measure:
    """Uses, in the tests, of private names that the package defines. A heuristic: types are not known."""
    defined = {name for tree in package.values() for name in private_definitions(tree)}
    found = [
        f"{path}:{line} {name}"
        for path, tree in tests.items()
        for line, name in private_uses(tree)
        if name in defined
    ]
    return Measure("private names of the package used in tests", str(len(found)), found)


def private_definitions(tree: ast.Module) -> Iterator[str]:
    """Private functions, classes, variables and attributes that a file defines."""
    for node in ast.walk(tree):
        if isinstance(node, Function | ast.ClassDef):
            name = node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            name = node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        else:
            continue
        if is_private(name):
            yield name


def private_uses(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Private names that a test takes from something other than itself, also by `setattr` and the like."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names = [] if is_self(node.value) else [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call):
            names = by_name(node)
        else:
            continue
        yield from ((node.lineno, name) for name in names if is_private(name))


def by_name(call: ast.Call) -> list[str]:
    """The attribute that `getattr(x, "name")`, `monkeypatch.setattr(x, "name", y)` and the like take."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name not in {"getattr", "setattr", "delattr", "hasattr"}:
        return []
    return [
        argument.value.rpartition(".")[2]
        for argument in call.args[:2]
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    ]


def is_private(name: str) -> bool:
    """Whether a name begins with one underscore; `_repr_mimebundle_` and its like are public protocols."""
    return name.startswith("_") and not name.startswith("__") and not name.endswith("_")


def is_self(node: ast.expr) -> bool:
    """Whether an expression is the `self` or `cls` of a method."""
    return isinstance(node, ast.Name) and node.id in {"self", "cls"}


# -- reading and printing --------------------------------------------------------------------------


def first_line(node: ast.stmt) -> int:
    """Of a statement, its decorators included."""
    decorators = node.decorator_list if isinstance(node, Function | ast.ClassDef) else []
    return min([node.lineno, *(each.lineno for each in decorators)])


def last_line(node: ast.stmt) -> int:
    """Of a statement."""
    return node.end_lineno or node.lineno


def quantile(ordered: Sequence[int], q: float) -> int:
    """The smallest value that a share `q` of them does not exceed."""
    return ordered[max(0, -(-round(q * 1000) * len(ordered) // 1000) - 1)]


def working_tree() -> Sources:
    """The Python files of the package and the tests as they are on disk."""
    files = (path for folder in (PACKAGE, TESTS) for path in sorted((ROOT / folder).rglob("*.py")))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}


def committed(commit: str) -> Sources:
    """The same files of a commit. SystemExit if git does not know it."""
    archive = subprocess.run(
        ["git", "archive", "--format=tar", commit, PACKAGE, TESTS], cwd=ROOT, capture_output=True, check=False
    )
    if archive.returncode:
        raise SystemExit(archive.stderr.decode().strip())
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        members = [each for each in files if each.isfile() and each.name.endswith(".py")]
        contents = ((each.name, files.extractfile(each)) for each in members)
        return {name: file.read().decode() for name, file in contents if file is not None}


def table(names: Sequence[str], columns: Sequence[Sequence[Measure]]) -> str:
    """One row for each figure, one column for each state of the repository."""
    rows = [["", *names], ["---"] * (len(names) + 1)]
    rows += [[cells[0].name, *(each.figure for each in cells)] for cells in zip(*columns, strict=True)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def details(measures: Iterable[Measure]) -> str:
    """The places behind the figures."""
    return "\n".join(
        f"\n{each.name}:\n" + "\n".join(f"  {place}" for place in each.places)
        for each in measures
        if each.places
    )


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--commit", action="append", default=[], help="a further column; may be repeated")
    parser.add_argument("--details", action="store_true", help="list the places, of the last column")
    options = parser.parse_args()
    columns = [measure(committed(commit)) for commit in options.commit] + [measure(working_tree())]
    print(table([*options.commit, "working tree"], columns))
    if options.details:
        print(details(columns[-1]))


if __name__ == "__main__":
    main()
