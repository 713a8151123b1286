"""The JSON of `GET /stats`: its shape and its units are a contract."""

import json

import pytest

from serving_kit.failures.breaker import Gate
from serving_kit.metrics import Metrics
from serving_kit.model import Layout, Limit
from serving_kit.records import (
    BatchReason,
    BatchRecord,
    Drop,
    DropRecord,
    Outcome,
    RequestRecord,
    TokensRecord,
)
from serving_kit.settings import Settings
from serving_kit.stats_json import JSON, stats_json
from serving_kit.status import Caches, CoreStatus, Load, ServerStatus, State

pytestmark = pytest.mark.light

PERCENTILES = {"p50", "p95", "p99"}


def core(**changes: object) -> CoreStatus:
    values = {
        "load": Load(queue_depth=2, in_flight=3),
        "draining": False,
        "breaker": Gate.CLOSED,
        "cost_known": True,
        "cost_released_reason": "",
        "call_s": 0.002,
        "token_s": 3e-6,
        "max_batch_tokens": 4096,
        "memory_limit_tokens": None,
        "running": None,
        "unavailable_reason": "",
        "degraded_reason": "",
        "settings": Settings(),
    }
    return CoreStatus(**{**values, **changes})  # type: ignore[arg-type]


def document(series: int = 0, **changes: object) -> JSON:
    metrics = Metrics()
    metrics.add_arrival(10.0, queue_depth=1, in_flight=2)
    metrics.add_request(RequestRecord(10.0, 10.1, Outcome.OK, 1, 0.02, 0.05))
    metrics.add_request(RequestRecord(10.0, 10.2, Outcome.CANCELLED, 1, None, None))
    metrics.add_batch(BatchRecord(10.0, 10.05, 2, 12, 16, BatchReason.FULL, 0.0, 0, 0, True))
    metrics.add_drop(DropRecord(10.0, 1.0, Drop.HOPELESS))
    if changes:
        metrics.add_tokens(TokensRecord(10.6, 40, 3, (0.2,), (0.05, 0.06)))
    metrics.add_change(10.5, {"max_batch_size": 8})
    status = ServerStatus(
        "default",
        "bert",
        "fill-mask",
        "cpu",
        State.READY,
        "",
        ("a note",),
        Layout(packed=True, reason="tried"),
        1.23456,
        core(**changes),
    )
    return stats_json(status, metrics.statistics(12.0, series, status.core.load))


def test_keys_and_units() -> None:
    stats = document()
    assert json.loads(json.dumps(stats)) == stats
    assert list(stats) == [
        *("name", "model", "task", "device", "precision", "state", "reason", "notes", "layout", "uptime_s"),
        *("queue_depth", "in_flight", "settings", "cost"),
        *("requests", "batches", "faults", "items", "wasted_items", "dropped_items", "shared_items"),
        *("window", "generation"),
    ]
    assert stats["generation"] is None
    assert (stats["state"], stats["notes"], stats["uptime_s"]) == ("ready", ["a note"], 1.235)
    assert type(stats["state"]) is str
    assert stats["precision"] == "exact"
    assert stats["settings"] == Settings().to_dict()
    assert stats["cost"] == {
        "known": True,
        "doubt": "",
        "call_ms": 2.0,
        "token_us": 3.0,
        "max_batch_tokens": 4096,
        "memory_limit_tokens": None,
    }
    assert stats["requests"] == {each.value: int(each in ("ok", "cancelled")) for each in Outcome}
    assert stats["batches"]["full"] == 1
    assert stats["dropped_items"] == {"expired": 0, "hopeless": 1}
    assert stats["layout"] == {"packed": True, "reason": "tried"}


def test_generation() -> None:
    caches = Caches(2, 90, Limit(4096, "max_cache_tokens"))
    stats = document(series=3, caches=caches)
    generation = stats["generation"]
    window = generation.pop("window")
    assert generation == {
        "running": 2,
        "cached_tokens": 90,
        "max_cache_tokens": 4096,
        "prompt_tokens": 40,
        "generated_tokens": 3,
        "evicted_sequences": 0,
    }
    assert (window["prompt_tokens_per_s"], window["generated_tokens_per_s"]) == (20.0, 1.5)
    assert window["first_token_ms"]["p50"] == pytest.approx(200, rel=0.03)
    assert window["inter_token_ms"]["p99"] == pytest.approx(50, rel=0.25)
    assert [each["tokens"] is None for each in stats["series"]] == [False, True, True]
    assert stats["series"][0]["tokens"].keys() == window.keys()


def test_window() -> None:
    window = document()["window"]
    assert list(window) == [
        *("seconds", "arrivals_per_s", "answers_per_s", "batches_per_s", "batch_size_mean"),
        *("batch_size_max", "padding", "busy", "samples", "latency_ms", "queue_wait_ms", "forward_ms"),
    ]
    assert window["latency_ms"].keys() == PERCENTILES
    assert window["latency_ms"]["p50"] == pytest.approx(100, rel=0.02)
    assert window["forward_ms"]["p99"] == pytest.approx(50, rel=0.02)


def test_series() -> None:
    stats = document(series=3)
    assert stats["changes"] == [{"ago_s": 1.5, "knobs": {"max_batch_size": 8}}]
    first, silent, last = stats["series"]
    assert list(first) == [
        *("second", "arrivals", "ok", "shed", "expired", "failed", "unavailable", "other"),
        *("queue_depth", "in_flight", "sizes", "reasons", "padding", "busy", "samples"),
        *("latency_ms", "queue_wait_ms", "forward_ms", "tokens"),
    ]
    assert first["tokens"] is None
    assert (first["second"], first["ok"], first["other"], first["arrivals"]) == (10, 1, 1, 1)
    assert (first["sizes"], first["reasons"], first["padding"]) == ({"2": 1}, {"full": 1}, 0.25)
    assert first["queue_wait_ms"].keys() == PERCENTILES
    assert silent["latency_ms"] == dict.fromkeys(("p50", "p95", "p99"))
    assert (last["queue_depth"], last["in_flight"]) == (2, 3)


def test_each_call_gives_new_seconds() -> None:
    """The caller may change what it is given."""
    stats = document(series=3)
    for point in stats["series"]:
        point.clear()
    assert all(document(series=3)["series"])
