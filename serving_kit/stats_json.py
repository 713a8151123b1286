"""`ServerStatus` and `Statistics` as the JSON object of `GET /stats`, `server.stats()` and the panel.

The shape is a contract: keys, nesting, units. Durations in milliseconds, except names that end in `_s`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from serving_kit.records import Outcome
from serving_kit.status import CoreStatus, Percentiles, Second, ServerStatus, Statistics, Tokens, Window

JSON = dict[str, Any]
_COUNTED = (Outcome.OK, Outcome.SHED, Outcome.EXPIRED, Outcome.FAILED, Outcome.UNAVAILABLE)


def stats_json(status: ServerStatus, statistics: Statistics) -> JSON:
    """Everything, as one JSON object; `series` and `changes` only where the statistics have a series."""
    return {**_status(status), **_statistics(statistics), "generation": _generation(status, statistics)}


def _status(status: ServerStatus) -> JSON:
    core = status.core
    return {
        "name": status.name,
        "model": status.model,
        "task": status.task,
        "device": status.device,
        "precision": status.precision,
        "state": status.state.value,
        "reason": status.reason,
        "notes": [*status.notes],
        "layout": status.layout._asdict(),
        "uptime_s": round(status.uptime_s, 3),
        "queue_depth": core.load.queue_depth,
        "in_flight": core.load.in_flight,
        "settings": core.settings.to_dict(),
        "cost": _cost(core),
    }


def _cost(core: CoreStatus) -> JSON:
    return {
        "known": core.cost_known,
        "doubt": core.cost_released_reason,
        "call_ms": core.call_s * 1e3,
        "token_us": core.token_s * 1e6,
        "max_batch_tokens": core.max_batch_tokens,
        "memory_limit_tokens": core.memory_limit_tokens,
    }


def _statistics(statistics: Statistics) -> JSON:
    document: JSON = {
        "requests": {outcome.value: count for outcome, count in statistics.requests.items()},
        "batches": {reason.value: count for reason, count in statistics.batches.items()},
        "faults": {fault.value: count for fault, count in statistics.faults.items()},
        "items": statistics.items,
        "wasted_items": statistics.wasted_items,
        "dropped_items": {reason.value: count for reason, count in statistics.dropped_items.items()},
        "shared_items": statistics.shared_items,
        "window": _window(statistics.window),
    }
    if statistics.series:
        document["series"] = [dict(_second(each)) for each in statistics.series]
        document["changes"] = [
            {"ago_s": round(each.ago_s, 3), "knobs": dict(each.settings)} for each in statistics.changes
        ]
    return document


def _generation(status: ServerStatus, statistics: Statistics) -> JSON | None:
    """Of a model with continuous batching; None: of another one."""
    caches, totals = status.core.caches, statistics.tokens
    if caches is None:
        return None
    return {
        "running": caches.sequences,
        "cached_tokens": caches.tokens,
        "max_cache_tokens": caches.limit.value,
        "prompt_tokens": totals.prompt,
        "generated_tokens": totals.generated,
        "evicted_sequences": totals.evicted_sequences,
        "window": _tokens(statistics.window.tokens),
    }


def _tokens(tokens: Tokens) -> JSON:
    return {
        "prompt_tokens_per_s": round(tokens.prompt_per_s, 1),
        "generated_tokens_per_s": round(tokens.generated_per_s, 1),
        "first_token_ms": _milliseconds(tokens.first_token),
        "inter_token_ms": _milliseconds(tokens.inter_token),
    }


def _window(window: Window) -> JSON:
    return {
        "seconds": window.duration_s,
        "arrivals_per_s": window.arrivals_per_s,
        "answers_per_s": window.answers_per_s,
        "batches_per_s": window.batches_per_s,
        "batch_size_mean": window.batch_size_mean,
        "batch_size_max": window.batch_size_max,
        "padding": window.padding,
        "busy": window.busy,
        "samples": window.samples,
        "latency_ms": _milliseconds(window.latency),
        "queue_wait_ms": _milliseconds(window.queue_time),
        "forward_ms": _milliseconds(window.model_time),
    }


@lru_cache(maxsize=1024)  # a page asks for the same 300 seconds again and again: 0.4 ms instead of 3 ms
def _second(second: Second) -> JSON:
    counted = {outcome.value: second.outcomes.get(outcome, 0) for outcome in _COUNTED}
    return {
        "second": second.second,
        "arrivals": second.arrivals,
        **counted,
        "other": sum(second.outcomes.values()) - sum(counted.values()),
        "queue_depth": second.queue_depth,
        "in_flight": second.in_flight,
        "sizes": {str(size): batches for size, batches in second.sizes.items()},
        "reasons": {reason.value: batches for reason, batches in second.reasons.items()},
        "padding": None if second.padding is None else round(second.padding, 4),
        "busy": second.busy,
        "samples": second.samples,
        "latency_ms": _milliseconds(second.latency),
        "queue_wait_ms": _milliseconds(second.queue_time),
        "forward_ms": _milliseconds(second.model_time),
        "tokens": None if second.tokens is None else _tokens(second.tokens),
    }


def _milliseconds(percentiles: Percentiles) -> dict[str, float | None]:
    return {
        name: None if seconds is None else round(seconds * 1e3, 3)
        for name, seconds in zip(("p50", "p95", "p99"), percentiles, strict=True)
    }
