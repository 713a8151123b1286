"""Counters and windows of what a server generates: tokens, and the times between them.

Kept as in `metrics.py`: a slot for each second, and durations as counts of logarithmic buckets. Not
thread-safe: `Metrics` holds its lock around every call.

Not here: requests and batches (`metrics.py`), the values that are read (`status.py`).
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, Metric

from serving_kit.durations import HISTORY_S, WINDOW_S, Histogram, bucket, merged, percentiles
from serving_kit.records import TokensRecord
from serving_kit.status import Tokens, TokenTotals

_FIRST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_BETWEEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)


@dataclass(slots=True)
class _Slot:
    """What happened in one second."""

    second: int
    prompt_tokens: int = 0
    new_tokens: int = 0
    first_token: Counter[int] = field(default_factory=Counter)  # buckets
    inter_token: Counter[int] = field(default_factory=Counter)


class TokenMetrics:
    """What one server has generated."""

    def __init__(self) -> None:
        self._slots: deque[_Slot] = deque(maxlen=HISTORY_S)
        self._prompt_tokens = self._new_tokens = self._evicted = 0
        self._first_token_s = Histogram(_FIRST_S)
        self._inter_token_s = Histogram(_BETWEEN_S)

    def add(self, record: TokensRecord) -> None:
        """A step of continuous batching has ended."""
        slot = self._slot(record.at)
        self._prompt_tokens += record.prompt_tokens
        self._new_tokens += record.new_tokens
        slot.prompt_tokens += record.prompt_tokens
        slot.new_tokens += record.new_tokens
        for seconds in record.first_token_s:
            slot.first_token[bucket(seconds)] += 1
            self._first_token_s.add(seconds)
        for seconds in record.inter_token_s:
            slot.inter_token[bucket(seconds)] += 1
            self._inter_token_s.add(seconds)

    def add_evicted(self, sequences: int) -> None:
        """Sequences have given their caches back to others."""
        self._evicted += sequences

    def totals(self) -> TokenTotals:
        """Since the start."""
        return TokenTotals(self._prompt_tokens, self._new_tokens, self._evicted)

    def window(self, now: float) -> Tokens:
        """The last `WINDOW_S` seconds, per second."""
        slots = [slot for slot in self._slots if slot.second > now - WINDOW_S]
        duration_s = max(1.0, min(WINDOW_S, now - self._slots[0].second)) if self._slots else 1.0
        return Tokens(
            prompt_per_s=sum(slot.prompt_tokens for slot in slots) / duration_s,
            generated_per_s=sum(slot.new_tokens for slot in slots) / duration_s,
            first_token=percentiles(merged(slot.first_token for slot in slots)),
            inter_token=percentiles(merged(slot.inter_token for slot in slots)),
        )

    def second(self, second: int) -> Tokens | None:
        """One of the last seconds; None: no step has ended in it."""
        slot = next((slot for slot in reversed(self._slots) if slot.second <= second), None)
        if slot is None or slot.second != second:
            return None
        return Tokens(
            slot.prompt_tokens, slot.new_tokens, percentiles(slot.first_token), percentiles(slot.inter_token)
        )

    def families(self) -> Iterator[Metric]:
        """Everything since the start, as Prometheus metric families."""
        tokens = CounterMetricFamily(
            "serving_kit_tokens", "Tokens that were computed: of prompts, of texts.", labels=["direction"]
        )
        tokens.add_metric(["prompt"], self._prompt_tokens)
        tokens.add_metric(["generated"], self._new_tokens)
        yield tokens
        yield CounterMetricFamily(
            "serving_kit_evicted_sequences",
            "Sequences that gave their caches back to others, and were computed again.",
            value=self._evicted,
        )
        yield self._first_token_s.family(
            "serving_kit_time_to_first_token_seconds", "Arrival to the first token of a text."
        )
        yield self._inter_token_s.family(
            "serving_kit_inter_token_latency_seconds", "Time between two tokens of a text."
        )

    def _slot(self, now: float) -> _Slot:
        """The slot of `now`. Threads disagree by microseconds: a late record goes into the newest."""
        if not self._slots or now >= self._slots[-1].second + 1:
            self._slots.append(_Slot(math.floor(now)))
        return self._slots[-1]
