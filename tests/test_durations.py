"""Percentiles of durations that were counted by logarithmic buckets."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving_kit.durations import bucket, percentiles

pytestmark = pytest.mark.light


@given(st.lists(st.floats(1e-6, 1000), min_size=1, max_size=200))
def test_percentile_error(values: list[float]) -> None:
    """A percentile is within 2 % of the true one."""
    true = [sorted(values)[int(q * (len(values) - 1))] for q in (0.5, 0.95, 0.99)]
    assert percentiles(Counter(map(bucket, values))) == pytest.approx(true, rel=0.021, abs=1e-6)


@pytest.mark.parametrize("seconds", [-1.0, 0.0, 1e-9, 1e-6])
def test_bucket_of_tiny_durations(seconds: float) -> None:
    assert bucket(seconds) == 0
