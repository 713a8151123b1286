"""Giving back the memory of a failed step."""

from __future__ import annotations

import gc
import weakref

import pytest

from serving_kit.models.memory import free_memory
from tests.support import run_script

pytestmark = pytest.mark.light


class Large:
    """What a frame holds."""


def failed(made: list[weakref.ref[Large]]) -> BaseException:
    """An exception whose traceback holds a `Large`, as does that of its cause."""

    def inner() -> None:
        held = Large()
        made.append(weakref.ref(held))
        raise ValueError

    def outer() -> None:
        held = Large()
        made.append(weakref.ref(held))
        try:
            inner()
        except ValueError as error:
            raise RuntimeError from error

    try:
        outer()
    except RuntimeError as error:
        return error
    raise AssertionError


def test_frames_are_cleared() -> None:
    """Those of the error and of its cause."""
    made: list[weakref.ref[Large]] = []
    error = failed(made)
    assert all(each() is not None for each in made)
    free_memory(error)
    assert all(each() is None for each in made)


def test_thorough_collects_old_cycles() -> None:
    class Node:
        """In a cycle with itself."""

    node = Node()
    node.itself = node  # type: ignore[attr-defined]
    gc.collect()  # now it is of the oldest generation
    gone = weakref.ref(node)
    del node
    free_memory(ValueError(), thorough=False)
    free_memory(ValueError(), thorough=True)
    assert gone() is None


def test_torch_is_not_imported() -> None:
    run_script(
        """
        import sys
        from serving_kit.models.functions import CallableModel
        CallableModel(list).free_memory(ValueError(), thorough=True)
        assert "torch" not in sys.modules
        """
    )
