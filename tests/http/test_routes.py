"""The routes that ask no model."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from serving_kit.model import EXACT
from serving_kit.settings import KNOBS
from tests.support_http import GatedModel, problem, server_of

pytestmark = pytest.mark.light


def test_health_during_a_long_model_call(client: httpx.Client, model: GatedModel) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.post, "/", content="wait")
        assert model.inside.wait(10)
        took = []
        for _ in range(20):
            start = time.perf_counter()
            assert client.get("/health").json() == {"status": "ready"}
            took.append(time.perf_counter() - start)
        assert sorted(took)[10] < 0.1, "it takes about a millisecond; the model call has no end"
        model.gate.set()
        assert running.result().status_code == 200


def test_settings_are_changed_with_the_token(client: httpx.Client) -> None:
    before = client.get("/settings").json()
    assert before.keys() == KNOBS.keys()
    token = {"authorization": f"Bearer {server_of(client).token}"}
    problem(client.patch("/settings", json={"max_batch_size": 2}), 401)
    for wrong in ("Bearer nope", "Basic x", server_of(client).token, "Bearer " + "é"):
        headers = {"authorization": wrong.encode()}
        problem(client.patch("/settings", json={"max_batch_size": 2}, headers=headers), 401)
    assert client.get("/settings").json() == before
    changed = client.patch("/settings", json={"max_batch_size": 2, "max_wait_ms": 5}, headers=token)
    assert changed.json() == {**before, "max_batch_size": 2, "max_wait_ms": 5.0}
    assert server_of(client).settings.max_batch_size == 2


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"max_batch_size": 0}, 422, "max_batch_size must be a whole number from 1 to 4,096 items, got 0"),
        ({"max_wait_ms": 5, "timeout_ms": "x"}, 422, "timeout_ms must be a number from 1"),
        ({"max_batchsize": 3}, 422, "did you mean max_batch_size?"),
        ({"overload_status": 418}, 422, "503 or 429, got 418"),
        ({"group_by_length": 1}, 422, "true or false"),
        ({"share_equal_inputs": True}, 422, "share_equal_inputs must be False for GatedModel"),
        ([1], 400, "settings must be an object"),
    ],
)
def test_bad_settings(client: httpx.Client, change: Any, status: int, words: str) -> None:
    before = client.get("/settings").json()
    token = {"authorization": f"Bearer {server_of(client).token}"}
    assert words in problem(client.patch("/settings", json=change, headers=token), status)["error"]
    assert client.get("/settings").json() == before


def test_stats_info_and_live(client: httpx.Client) -> None:
    client.post("/", content="a")
    stats = client.get("/stats?series=10").json()
    assert stats["requests"]["ok"] == 1
    assert stats["window"]["latency_ms"]["p50"] > 0
    assert stats["batches"]["idle"] == 1
    assert len(stats["series"]) == 10
    assert sum(second["ok"] for second in stats["series"]) == 1
    assert "series" not in client.get("/stats?series=%F0%9F%98%80").json()
    info = client.get("/info").json()
    assert (info["task"], info["layout"]) == ("function", {"packed": False, "reason": ""})
    assert info["precision"] == EXACT._asdict()
    assert client.get("/live").json() == {"status": "live"}


def test_metrics(client: httpx.Client) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    client.post("/", content="a")
    client.post("/", content="")
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = {f.name: f for f in text_string_to_metric_families(response.text)}
    assert families.keys() >= {
        "serving_kit_requests",
        "serving_kit_queue_depth",
        "serving_kit_in_flight",
        "serving_kit_batch_size",
        "serving_kit_batches",
        "serving_kit_queue_wait_seconds",
        "serving_kit_forward_seconds",
        "serving_kit_request_seconds",
    }
    requests = {s.labels["outcome"]: s.value for s in families["serving_kit_requests"].samples}
    assert (requests["ok"], requests["malformed"], requests["failed"]) == (1, 1, 0)
    for name in ("batch_size", "request_seconds"):
        samples = families[f"serving_kit_{name}"].samples
        buckets = [s.value for s in samples if s.name.endswith("_bucket")]
        assert buckets == sorted(buckets)
        assert buckets[-1] == next(s.value for s in samples if s.name.endswith("_count")) == 1


def test_openapi_document(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    assert document["openapi"] == "3.1.0"
    token = {"authorization": f"Bearer {server_of(client).token}"}
    for path, methods in document["paths"].items():
        if "get" in methods:
            needed = token if "security" in methods["get"] else {}
            assert client.get(path, headers=needed).status_code == 200
    knobs = document["components"]["schemas"]["Settings"]["properties"]
    assert knobs.keys() == KNOBS.keys()


def test_settings_above_max_body_bytes(server: Any) -> None:
    token = {"authorization": f"Bearer {server.token}"}
    url = f"{server.url}/settings"
    assert httpx.patch(url, json={"max_body_bytes": 1}, headers=token).status_code == 200
    assert httpx.post(server.url, content="ab").status_code == 413
    everything = server.settings.to_dict() | {"max_body_bytes": 1000}
    assert httpx.patch(url, json=everything, headers=token).json()["max_body_bytes"] == 1000
    assert httpx.post(server.url, content="ab").json() == "ab"
    refused = httpx.patch(url, content=b" " * 1_000_000, headers=token)
    assert refused.status_code == 413
    assert "max_body_bytes" not in refused.json()["error"], "raising that knob would not help"


def test_settings_that_take_longer_than_timeout_ms(server: Any) -> None:
    server.tune(timeout_ms=1)
    body = b'{"timeout_ms": 5000}'
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20) as raw:
        raw.sendall(
            b"PATCH /settings HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %s\r\n"
            b"Content-Length: %d\r\n\r\n" % (server.token.encode(), len(body))
        )
        for _ in range(10):  # each takes more than a millisecond
            assert httpx.get(f"{server.url}/live").status_code == 200
        raw.sendall(body)
        assert raw.makefile("rb").readline().startswith(b"HTTP/1.1 200 ")
    assert server.settings.timeout_ms == 5000


@pytest.mark.parametrize("name", ["self", "changes", "", "__init__", "max_wait_s", "by"])
def test_unknown_settings(server: Any, name: str) -> None:
    before = server.settings
    token = {"authorization": f"Bearer {server.token}"}
    refused = httpx.patch(f"{server.url}/settings", content=json.dumps({name: 1}), headers=token)
    assert refused.status_code == 422
    assert f"no setting named {name!r}" in refused.json()["error"]
    assert server.settings == before
    assert name not in KNOBS


@pytest.mark.parametrize(("asked", "given"), [("1000000", 300), ("300", 300), ("7", 7), ("9" * 5000, 300)])
def test_length_of_series(server: Any, asked: str, given: int) -> None:
    assert len(httpx.get(f"{server.url}/stats?series={asked}").json()["series"]) == given
