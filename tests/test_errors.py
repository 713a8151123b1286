"""The tree of errors: one outcome for each class, texts of bounded length."""

from __future__ import annotations

import pytest

import serving_kit
from serving_kit import errors
from serving_kit.errors import ServingError, error_text
from serving_kit.records import Outcome

pytestmark = pytest.mark.light

OUTCOMES = {
    errors.MalformedRequest: Outcome.MALFORMED,
    errors.SlowRequest: Outcome.MALFORMED,
    errors.UnsupportedMediaType: Outcome.MALFORMED,
    errors.RequestTooLarge: Outcome.TOO_LARGE,
    errors.InputRejected: Outcome.REJECTED,
    errors.Overloaded: Outcome.SHED,
    errors.Unavailable: Outcome.UNAVAILABLE,
    errors.Stopping: Outcome.UNAVAILABLE,
    errors.DeadlineExceeded: Outcome.EXPIRED,
    errors.ClientGone: Outcome.CANCELLED,
    errors.ModelFailed: Outcome.FAILED,
}


def subclasses(kind: type[ServingError]) -> set[type[ServingError]]:
    below = set(kind.__subclasses__())
    return below.union(*map(subclasses, below)) if below else below


def test_outcome_of_each_class() -> None:
    assert {each: each.outcome for each in OUTCOMES} == OUTCOMES


def test_no_class_and_no_outcome_missing() -> None:
    """Only an answered request has no error."""
    assert {each for each in subclasses(ServingError) if each.__module__ == errors.__name__} == set(OUTCOMES)
    assert set(OUTCOMES.values()) == set(Outcome) - {Outcome.OK}


@pytest.mark.parametrize("name", [name for name in serving_kit.__all__ if hasattr(errors, name)])
def test_public_errors(name: str) -> None:
    assert getattr(serving_kit, name) is getattr(errors, name)


def test_builtin_bases() -> None:
    assert issubclass(errors.SettingError, ValueError)
    assert issubclass(errors.StartError, RuntimeError)
    assert issubclass(errors.Stopping, RuntimeError)


def test_retry_after() -> None:
    assert errors.Overloaded("full").retry_after is None
    assert errors.Overloaded("full", retry_after=2.0).retry_after == 2.0
    assert errors.Stopping().retry_after is not None


def test_detail_is_shortened() -> None:
    """An exception may quote an input of megabytes."""
    error = errors.ModelFailed("failed", detail="x" * 1_000_000)
    assert error.detail is not None
    assert len(error.detail) < 2100
    assert str(error) == "failed"


def test_error_text() -> None:
    class Unprintable(Exception):
        def __str__(self) -> str:
            raise LookupError

    assert error_text(ValueError("three")) == "ValueError: three"
    assert error_text(Unprintable()) == "Unprintable: (its text cannot be made)"
