"""How seconds and changes are encoded for the browser."""

import json

import pytest

from serving_kit.notebook import frames

pytestmark = pytest.mark.light

TIMES = {"p50": 123.456, "p95": 1234.567, "p99": 12345.678}
BUSY = {
    **dict.fromkeys(frames.COUNTS, 99_999),
    **dict.fromkeys(("latency_ms", "queue_wait_ms", "forward_ms"), TIMES),
    "sizes": {str(size): size for size in range(1, 4097, 7)},
    "reasons": dict.fromkeys(frames.REASONS, 999),
    "padding": 0.123,
    "tokens": {
        "generated_tokens_per_s": 123.456,
        "prompt_tokens_per_s": 99_999.9,
        "first_token_ms": TIMES,
        "inter_token_ms": TIMES,
    },
}


def test_row_size():
    row = frames.encode_row(BUSY)
    assert len(row) * frames.SECONDS < 22_000
    assert len(json.loads(row)[-2]) <= 24, "rows of the chart"


def test_row_order():
    row = json.loads(frames.encode_row(BUSY))
    assert row[:9] == [99_999] * 9
    assert row[9:15] == [123, 1235, 12346, 123, 123, 0.12]
    assert row[15] == [123, 100_000, 123, 123, 12346]
    assert json.loads(frames.encode_row({**BUSY, "tokens": None}))[15] == 0
    assert row[-1] == [999] * len(frames.REASONS)


def test_empty_second():
    assert frames.encode_row({**BUSY, **dict.fromkeys(frames.COUNTS, 0), "sizes": {}}) == b"0"


@pytest.mark.parametrize(
    ("sizes", "step", "digits"), [({}, 1, ""), ({1: 1, 3: 8}, 1, "108"), ({1: 1, 2: 1, 6: 2}, 2, "505")]
)
def test_sizes(sizes, step, digits):
    assert frames.encode_sizes(sizes, step) == digits


def test_frame():
    frame = json.loads(frames.encode_frame({"state": "ready"}, 7, [b"0", b"[1]"]))
    assert frame == {"state": "ready", "first": 7, "rows": [0, [1]]}


def test_recent_changes():
    """Old changes are dropped, except the last of each setting."""
    old = [{"ago_s": 900 - i, "knobs": {"timeout_ms": i}} for i in range(3)]
    new = [{"ago_s": 50 - i, "knobs": {"max_batch_size": i}} for i in range(2)]
    assert frames.recent_changes([*old, *new]) == [old[-1], *new]
