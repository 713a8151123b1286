"""One frame of the panel: the newest snapshot of a server, and a compact row for each second.

A frame is complete, so that a view that opens late shows everything at once. It is JSON of at most about
14 kB, as bytes, because those are not escaped again on their way to the browser. `frontend/snapshot.js`
decodes it.

All functions are pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import orjson

from serving_kit.records import BatchReason

JSON: TypeAlias = dict[str, Any]  # an object of `Server.stats()`

SECONDS = 120  # what the charts show
REASONS = [reason.value for reason in BatchReason]
COUNTS = (
    "queue_depth",
    "in_flight",
    "arrivals",
    "ok",
    "shed",
    "expired",
    "failed",
    "unavailable",
    "samples",
)
_SIZE_ROWS = 24  # rows of the chart of batch sizes, which bounds a frame
_MAX_CHANGES = 40
_EMPTY_ROW = b"0"  # a second in which nothing happened


def encode_frame(snapshot: Mapping[str, object], first_second: int, rows: Sequence[bytes]) -> bytes:
    """The frame as JSON.

    Args:
        snapshot: As `Server.stats()`, without its series.
        first_second: The second of the first row; the others follow without a gap.
        rows: What `encode_row` returned for each second.
    """
    head = orjson.dumps({**snapshot, "first": first_second})
    return head[:-1] + b',"rows":[' + b",".join(rows) + b"]}"


def encode_row(point: JSON) -> bytes:
    """One second of the series as a JSON array; `decodeRow` in `snapshot.js` has the same order."""
    if not any(point[name] for name in COUNTS) and not point["sizes"]:
        return _EMPTY_ROW
    sizes = {int(size): batches for size, batches in point["sizes"].items()}
    step = math.ceil(max(sizes, default=1) / _SIZE_ROWS)
    latency, padding = point["latency_ms"], point["padding"]
    return orjson.dumps(
        [
            *(point[name] for name in COUNTS),
            *(_three_digits(latency[name]) for name in ("p50", "p95", "p99")),
            _three_digits(point["queue_wait_ms"]["p50"]),
            _three_digits(point["forward_ms"]["p50"]),
            None if padding is None else round(padding, 2),
            _tokens(point["tokens"]),
            step,
            encode_sizes(sizes, step),
            [point["reasons"].get(reason, 0) for reason in REASONS] if sizes else 0,
        ]
    )


def encode_sizes(sizes: Mapping[int, int], step: int) -> str:
    """How many batches had which size: a digit for each `step` sizes, in ninths of all, rounded up."""
    if not sizes:
        return ""
    total = sum(sizes.values())
    rows = [0] * ((max(sizes) - 1) // step + 1)
    for size, batches in sizes.items():
        rows[(size - 1) // step] += batches
    return "".join([str(-(-9 * batches // total)) for batches in rows])


def recent_changes(changes: Sequence[JSON]) -> list[JSON]:
    """The changes of settings that the charts show, and the last change of each setting, oldest first."""
    last = {name: id(change) for change in changes for name in change["knobs"]}
    kept = [each for each in changes if each["ago_s"] < SECONDS or id(each) in last.values()]
    return kept[-_MAX_CHANGES:]


def _tokens(tokens: JSON | None) -> list[float | None] | int:
    """What was generated in a second; 0: nothing."""
    if tokens is None:
        return 0
    first, between = tokens["first_token_ms"], tokens["inter_token_ms"]
    return [
        _three_digits(tokens["generated_tokens_per_s"]),
        _three_digits(tokens["prompt_tokens_per_s"]),
        _three_digits(first["p50"]),
        _three_digits(between["p50"]),
        _three_digits(between["p99"]),
    ]


def _three_digits(value: float | None) -> float | None:
    """Rounded to what a pixel can show."""
    if value is None:
        return None
    return round(value) if value >= 100 else float(f"{value:.3g}")
