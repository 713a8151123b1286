"""The values between the engine and a model."""

from __future__ import annotations

import pytest

from serving_kit.model import More, Work, computed_tokens

pytestmark = pytest.mark.light


def test_tokens_of_several_sequences() -> None:
    assert Work(sequences=3, longest=20).tokens == 60
    assert Work().tokens == 1


def test_work_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Work().longest = 2  # type: ignore[misc]


@pytest.mark.parametrize(("items", "tokens"), [([], 0), ([7], 7), ([1, 5, 3], 15), ([4, 4], 8)])
def test_computed_tokens(items: list[int], tokens: int) -> None:
    assert computed_tokens(items, packed=False) == tokens
    assert computed_tokens(iter(items), packed=False) == tokens
    assert computed_tokens(iter(items), packed=True) == sum(items)


def test_more_without_a_chunk() -> None:
    assert More() == More(chunk=None, work=Work())
