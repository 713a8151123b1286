"""What the owner reads when a model cannot be loaded."""

from __future__ import annotations

import pytest

from serving_kit.models.advice import advice

pytestmark = pytest.mark.light


class OutOfMemoryError(RuntimeError):
    """As torch's is called."""


class GatedRepoError(OSError):
    """As that of huggingface_hub is called."""


class LocalEntryNotFoundError(OSError):
    """As that of huggingface_hub is called."""


def raised_from(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "out of memory. Free some"),
        (OutOfMemoryError("CUDA"), "out of memory. Free some"),
        (RuntimeError("DefaultCPUAllocator: Out of memory: 1 TB"), "smaller model"),
        (AssertionError("Torch not compiled with CUDA enabled"), "this build of torch has no CUDA"),
        (raised_from(OSError("x"), GatedRepoError()), "grant you access"),
        (OSError("x is not a valid model identifier listed on"), "no folder and no public model"),
        (LocalEntryNotFoundError(), "the Hub cannot be reached"),
        (OSError("We couldn't connect to the Hub"), "the Hub cannot be reached"),
        (KeyError("Unknown task x, available tasks are y"), "Unknown task x"),
        (RuntimeError("Inferring the task automatically requires a hub."), "task='fill-mask'"),
        (ValueError("line one\nline two"), "ValueError: line one"),
        (ValueError(), "ValueError: ValueError"),
    ],
)
def test_advice(error: BaseException, line: str) -> None:
    assert line in advice(error)
    assert "\n" not in advice(error)


def test_circle_of_causes() -> None:
    first, second = ValueError("one"), ValueError("two")
    first.__cause__, second.__cause__ = second, first
    assert advice(first) == "ValueError: one"
