"""The documentation and the docstrings: links and file names exist, words are plain."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import REPOSITORY

pytestmark = pytest.mark.light

PAGES = [
    *(REPOSITORY / name for name in ("README.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
    *sorted((REPOSITORY / "notebooks").glob("*.ipynb")),
]
FILE = re.compile(r"`((?:[\w.]+/)*(?:\w+\.py|[\w./]+/))`")
AVOIDED = [
    "nobody",
    "somebody",
    "everybody",
    "stranger",
    "for ever",
    "the door",
    "culprit",
    "witness",
    "ceiling",
    "in vain",
    "vouched",
    "blamed",
]


def name(page: Path) -> str:
    return page.name


def files_named_in(page: Path) -> list[str]:
    """The Python files and folders in backquotes."""
    return sorted(set(FILE.findall(page.read_text(encoding="utf-8"))))


def avoided_words_in(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8").lower()
    return [word for word in AVOIDED if re.search(rf"\b{word}\b", text)]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_local_links(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize(
    "page", [REPOSITORY / "docs" / "architecture.md", REPOSITORY / "SECURITY.md"], ids=name
)
def test_named_files(page: Path) -> None:
    """Relative to the repository, to the package, or to a folder of the tests."""
    roots = [REPOSITORY, REPOSITORY / "serving_kit"]
    named = files_named_in(page)
    missing = [
        file
        for file in named
        if not any((root / file).exists() for root in roots) and not any(REPOSITORY.glob(f"tests/*/{file}"))
    ]
    assert missing == []


def test_files_named_in_modules() -> None:
    """In docstrings and comments: relative to the module's own folder, or to the package."""
    package = REPOSITORY / "serving_kit"
    missing = [
        f"{module.relative_to(package)}: {file}"
        for module in sorted(package.rglob("*.py"))
        for file in files_named_in(module)
        if not any((root / file).exists() for root in (module.parent, package, package / "notebook"))
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_plain_words(page: Path) -> None:
    """The words of `docs/glossary.md`, and no metaphors."""
    assert avoided_words_in(page) == []


def test_plain_words_in_modules() -> None:
    modules = sorted((REPOSITORY / "serving_kit").rglob("*.py"))
    assert {module.name: words for module in modules if (words := avoided_words_in(module))} == {}
