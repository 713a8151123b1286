"""Freed memory stays with the process where glibc is, and nothing happens elsewhere."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from typing import Any

import pytest

from serving_kit.models import heap
from tests.support import run_script

pytestmark = pytest.mark.light


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process in which nothing has been set, and which is not changed."""
    heap.keep_freed_memory.cache_clear()
    for name in heap._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield
    heap.keep_freed_memory.cache_clear()


class Library:
    """A C library that keeps what `mallopt` is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def mallopt(self, which: int, value: int) -> int:
        self.calls.append((which, value))
        return 1


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    own = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: own)
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.36", raising=False)
    return own


def test_set_once(library: Library) -> None:
    assert heap.keep_freed_memory()
    assert heap.keep_freed_memory()
    assert library.calls == [(-3, 2**25), (-1, 2**25)]


@pytest.mark.parametrize("name", heap._VARIABLES)
def test_the_owners_own_setting_stays(library: Library, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    assert not heap.keep_freed_memory()
    assert library.calls == []


@pytest.mark.parametrize("error", [AttributeError, OSError, ValueError])
def test_without_glibc(library: Library, monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def confstr(name: str) -> Any:
        raise error(name)

    monkeypatch.setattr(os, "confstr", confstr, raising=False)
    assert not heap.keep_freed_memory()
    assert library.calls == []


def test_another_c_library(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "confstr", lambda name: None, raising=False)
    assert not heap.keep_freed_memory()
    assert library.calls == []


@pytest.mark.skipif(not heap._has_glibc(), reason="needs glibc")
def test_a_freed_block_causes_no_new_page_faults() -> None:
    run_script(
        """
        import ctypes, resource
        from serving_kit.models.heap import keep_freed_memory

        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

        def faults():
            # of ten steps with four blocks of 6 MiB
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(10):
                blocks = [libc.malloc(6 * 2**20) for _ in range(4)]
                for block in blocks:
                    ctypes.memset(ctypes.c_void_p(block), 1, 6 * 2**20)
                for block in blocks:
                    libc.free(block)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        assert keep_freed_memory()
        faults()
        assert faults() < 1000, "a step has 6144 pages"
        """
    )
