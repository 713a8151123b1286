"""The documentation: links and file names exist, words are plain."""

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
]


def name(page: Path) -> str:
    return page.name


def files_named_in(page: Path) -> list[str]:
    """The Python files and folders in backquotes."""
    return sorted(set(FILE.findall(page.read_text(encoding="utf-8"))))


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


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_plain_words(page: Path) -> None:
    """The words of `docs/glossary.md`, and no metaphors."""
    text = page.read_text(encoding="utf-8").lower()
    assert [word for word in AVOIDED if re.search(rf"\b{word}\b", text)] == []
