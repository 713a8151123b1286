"""Faults of every kind at once: `make soak` in small."""

from __future__ import annotations

import pytest

from tests.programs import load_program

pytestmark = pytest.mark.light


def test_short_soak() -> None:
    """`make soak` in small."""
    soak = load_program("scripts/soak.py").Soak(3000, seconds=60)
    soak.run()
    print(soak.report())
    assert soak.problems == []
    assert soak.seen.total() + soak.left == 3000
    assert soak.seen["ok"] > 300, "how many depends on the machine: the knobs turn with the clock"
    assert {"malformed", "too_large", "rejected", "shed", "expired", "failed"} <= set(soak.seen)
