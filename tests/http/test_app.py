"""HTTP as a client sees it: a real uvicorn on a real port, and a model that does as it is told."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import pytest

from serving_kit.records import Outcome
from serving_kit.settings import KNOBS
from tests.support import until

pytestmark = pytest.mark.light
Serve = Callable[..., Any]


class Model:
    """Upper case; "raise" raises, and "wait" waits at the gate."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.inside = threading.Event()
        self.sizes: list[int] = []

    def __call__(self, texts: list[Any], *, suffix: str = "") -> list[Any]:
        self.sizes.append(len(texts))
        if "raise" in texts:
            raise ValueError("the secret is /home/alice/token")
        if "nan" in texts:
            return [float("nan")] * len(texts)
        if "wait" in texts:
            self.inside.set()
            assert self.gate.wait(10)
        return [str(text).upper() + suffix for text in texts]


@pytest.fixture
def model() -> Iterator[Model]:
    model = Model()
    yield model
    model.gate.set()


@pytest.fixture
def client(serve: Serve, model: Model) -> Iterator[httpx.Client]:
    server = serve(model, max_queue_size=4)
    with httpx.Client(base_url=server.url, timeout=10) as client:
        client.server = server  # type: ignore[attr-defined]
        yield client


def server_of(client: httpx.Client) -> Any:
    return client.server  # type: ignore[attr-defined]


def problem(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["status"] == status
    assert body["error"] == body["detail"]
    assert body["request_id"] == response.headers["x-request-id"]
    assert "Traceback" not in response.text
    assert "/home" not in response.text
    return body


# -- answers ---------------------------------------------------------------------------------------


def test_a_text_gets_the_models_own_answer(client: httpx.Client) -> None:
    response = client.post("/", content="test [MASK]")
    assert (response.status_code, response.json()) == (200, "TEST [MASK]")
    assert response.headers["content-type"] == "application/json"


def test_json_with_parameters_and_lists(client: httpx.Client) -> None:
    body = {"inputs": ["a", "b"], "parameters": {"suffix": "!"}}
    assert client.post("/", json=body).json() == ["A!", "B!"]
    assert client.post("/", json={"inputs": "a"}).json() == "A"


def test_what_arrives_together_while_the_model_is_busy_runs_together(
    client: httpx.Client, model: Model
) -> None:
    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(client.post, "/", content="wait")
        assert model.inside.wait(10)
        others = [pool.submit(client.post, "/", content=t) for t in "abcd"]
        until(lambda: server_of(client).stats()["queue_depth"] == 4)
        model.gate.set()
        assert [f.result().json() for f in others] == list("ABCD")
        assert first.result().json() == "WAIT"
    assert model.sizes == [1, 4]


def test_health_answers_at_once_while_a_long_forward_runs(client: httpx.Client, model: Model) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.post, "/", content="wait")
        assert model.inside.wait(10)
        took = []
        for _ in range(20):
            start = time.perf_counter()
            assert client.get("/health").json() == {"status": "ready"}
            took.append(time.perf_counter() - start)
        assert sorted(took)[10] < 0.1, "it needs about a millisecond; the forward would take for ever"
        model.gate.set()
        assert running.result().status_code == 200


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "status", "kind", "words"),
    [
        ({"content": b""}, 400, "malformed_request", "the body is empty"),
        ({"content": b"\xff\xfe\xfa"}, 400, "malformed_request", "not UTF-8"),
        ({"json": {"inputs": 5, "x": 1}}, 400, "malformed_request", "unknown member 'x'"),
        ({"json": {"inputs": "a", "parameters": {"nope": 1}}}, 400, "malformed_request", "'nope'"),
        ({"json": [1, 2]}, 400, "malformed_request", "object with"),
        (
            {"content": b"[" * 5000 + b"]" * 5000, "headers": {"content-type": "application/json"}},
            400,
            None,
            "nested",
        ),
        ({"content": b"x" * (2**20 + 1)}, 413, "request_too_large", "1048576"),
        ({"json": {"inputs": ["a"] * 5}}, 413, "request_too_large", "5 inputs in one request; the most is 4"),
        ({"content": b"a", "headers": {"content-encoding": "gzip"}}, 400, None, "compressed"),
        ({"content": b"a", "headers": {"x-request-timeout-ms": "soon"}}, 400, None, "X-Request-Timeout-Ms"),
        ({"content": b"a", "headers": {"x-request-timeout-ms": "-1"}}, 400, None, "X-Request-Timeout-Ms"),
        ({"content": b"a", "headers": {"x-request-timeout-ms": "nan"}}, 400, None, "X-Request-Timeout-Ms"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong_and_the_server_goes_on(
    client: httpx.Client, request_: dict[str, Any], status: int, kind: str | None, words: str
) -> None:
    body = problem(client.post("/", **request_), status)
    assert words in body["error"]
    assert kind in (None, body["error_type"])
    assert client.post("/", content="a").json() == "A"
    outcomes = server_of(client).stats()["requests"]
    assert (outcomes["malformed"] + outcomes["too_large"], outcomes["ok"]) == (1, 1)


def test_a_chunked_body_without_a_length_is_bounded_while_it_is_read(client: httpx.Client) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(2000):
            yield b"x" * 10_000

    with suppress(httpx.WriteError):  # if it has answered and closed while we were still sending: as good
        problem(client.post("/", content=endless()), 413)
    assert client.get("/health").status_code == 200


def test_a_hundred_megabytes_are_refused_by_their_announcement(client: httpx.Client) -> None:
    url = httpx.URL(str(client.base_url))
    with socket.create_connection((url.host, url.port or 80), timeout=10) as sock:
        sock.sendall(b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 104857600\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 413")


def test_a_body_that_never_ends_times_out(client: httpx.Client) -> None:
    url = httpx.URL(str(client.base_url))
    with socket.create_connection((url.host, url.port or 80), timeout=10) as sock:
        sock.sendall(b"POST / HTTP/1.1\r\nhost: localhost\r\nx-request-timeout-ms: 100\r\n")
        sock.sendall(b"content-length: 10\r\n\r\nab")
        assert sock.recv(100).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/nothing", 404, "GET /openapi.json lists the rest"),
        ("POST", "/health", 405, "GET"),
        ("DELETE", "/", 405, "takes"),
        ("PUT", "/settings", 405, "takes"),
    ],
)
def test_an_unknown_route_or_method(
    client: httpx.Client, method: str, path: str, status: int, words: str
) -> None:
    assert words in problem(client.request(method, path), status)["error"]


def test_a_full_queue_refuses_at_once_with_the_status_that_was_asked_for(
    client: httpx.Client, model: Model
) -> None:
    with ThreadPoolExecutor(5) as pool:
        client.post("/", content="a")  # so that the drain rate is known
        waiting = [pool.submit(client.post, "/", content="wait")]
        assert model.inside.wait(10)
        waiting += [pool.submit(client.post, "/", content=t) for t in "abcd"]
        until(lambda: server_of(client).stats()["queue_depth"] == 4)
        refused = client.post("/", content="e")
        assert problem(refused, 503)["error_type"] == "overloaded"
        assert refused.headers["retry-after"] == "1"
        server_of(client).tune(overload_status=429)
        assert problem(client.post("/", content="e"), 429)["title"] == "Too Many Requests"
        model.gate.set()
        assert all(f.result().status_code == 200 for f in waiting)
    assert server_of(client).stats()["requests"]["shed"] == 2


def test_a_request_whose_time_is_up_gets_504_while_the_forward_still_runs(
    client: httpx.Client, model: Model
) -> None:
    late = client.post("/", content="wait", headers={"x-request-timeout-ms": "50"})
    assert problem(late, 504)["error_type"] == "deadline_exceeded"
    assert not model.gate.is_set(), "it is still running"
    queued = client.post("/", content="never started", headers={"x-request-timeout-ms": "50"})
    problem(queued, 504)
    model.gate.set()
    assert client.post("/", content="b").json() == "B"
    stats = server_of(client).stats()
    assert (stats["requests"]["expired"], stats["wasted_items"]) == (2, 1)
    assert model.sizes == [1, 1], "the one that waited never ran"


def test_bodies_that_are_too_much_together_are_refused_and_forgotten(
    client: httpx.Client, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    server_of(client).tune(max_body_bytes=1000)
    monkeypatch.setattr("serving_kit.service._MOST_HELD", 1500)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.post, "/", content="wait")
        assert model.inside.wait(10)
        second = pool.submit(client.post, "/", content="a" * 900)
        until(lambda: server_of(client).stats()["queue_depth"] == 1)
        refused = client.post("/", content="b" * 900)
        assert "too many bytes" in problem(refused, 503)["error"]
        model.gate.set()
        assert first.result().status_code == second.result().status_code == 200
    assert client.post("/", content="b" * 900).status_code == 200
    assert client.post("/", content="").status_code == 400
    assert server_of(client)._service.held == 0


def test_a_client_that_leaves_frees_its_place_at_once(client: httpx.Client, model: Model) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.post, "/", content="wait")
        assert model.inside.wait(10)
        with pytest.raises(httpx.ReadTimeout):
            client.post("/", content="impatient", timeout=0.05)
        until(lambda: server_of(client).stats()["queue_depth"] == 0)
        model.gate.set()
        assert running.result().status_code == 200
    assert server_of(client).stats()["requests"]["cancelled"] == 1
    assert model.sizes == [1]


def test_a_client_that_was_slow_to_send_and_then_leaves_frees_its_place_too(
    client: httpx.Client, model: Model
) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.post, "/", content="wait")
        assert model.inside.wait(10)
        url = httpx.URL(str(client.base_url))
        with socket.create_connection((url.host, url.port or 80), timeout=10) as sock:
            sock.sendall(b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 4\r\n\r\nab")
            time.sleep(0.1)  # longer than a request lasts that nobody watches
            sock.sendall(b"cd")
            until(lambda: server_of(client).stats()["queue_depth"] == 1)
        until(lambda: server_of(client).stats()["queue_depth"] == 0)
        model.gate.set()
        assert running.result().status_code == 200
    assert server_of(client).stats()["requests"]["cancelled"] == 1
    assert model.sizes == [1]


def test_a_client_that_leaves_in_the_middle_of_its_body_is_counted_as_gone(client: httpx.Client) -> None:
    url = httpx.URL(str(client.base_url))
    with socket.create_connection((url.host, url.port or 80), timeout=10) as sock:
        sock.sendall(b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 4\r\n\r\nab")
        until(lambda: server_of(client).stats()["window"]["arrivals_per_s"] > 0)
    until(lambda: server_of(client).stats()["requests"]["cancelled"] == 1)


# -- failures --------------------------------------------------------------------------------------


def test_a_failure_tells_the_client_an_id_and_the_owner_everything(client: httpx.Client) -> None:
    body = problem(client.post("/", content="raise"), 500)
    assert "secret" not in body["error"]
    (incident,) = server_of(client).errors()
    assert incident.id == body["incident"]
    assert incident.id in body["error"]
    assert "the secret is /home/alice/token" in incident.error
    assert "in __call__" in incident.traceback
    assert incident.outcome is Outcome.FAILED


def test_expose_errors_shows_the_text_to_clients(client: httpx.Client) -> None:
    server_of(client).tune(expose_errors=True)
    response = client.post("/", content="raise")
    assert response.status_code == 500
    assert "ValueError: the secret is /home/alice/token" in response.json()["error"]
    assert "Traceback" not in response.text


def test_an_answer_that_json_cannot_carry_is_a_failure_of_the_model(client: httpx.Client) -> None:
    body = problem(client.post("/", content="nan"), 500)
    assert "cannot be written as JSON" in body["error"]
    (incident,) = server_of(client).errors()
    assert incident.id == body["incident"]
    assert "not JSON compliant" in incident.error


def test_a_bug_in_a_route_is_an_incident_and_never_a_traceback(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving_kit.http.openapi.document", lambda *_: 1 / 0)
    body = problem(client.get("/openapi.json"), 500)
    assert server_of(client).errors()[0].id == body["incident"]
    assert "ZeroDivisionError" in server_of(client).errors()[0].error


# -- the other routes ------------------------------------------------------------------------------


def test_settings_are_read_by_anybody_and_changed_with_the_token(client: httpx.Client) -> None:
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
        ([1], 400, "settings must be an object"),
    ],
)
def test_a_bad_setting_is_refused_and_nothing_changes(
    client: httpx.Client, change: Any, status: int, words: str
) -> None:
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
    assert client.get("/info").json()["task"] == "function"
    assert client.get("/live").json() == {"status": "live"}


def test_metrics_are_prometheus_text_with_the_names_that_were_promised(client: httpx.Client) -> None:
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


def test_the_openapi_document_names_every_route_and_knob(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    assert document["openapi"] == "3.1.0"
    token = {"authorization": f"Bearer {server_of(client).token}"}
    for path, methods in document["paths"].items():
        if "get" in methods:
            needed = token if "security" in methods["get"] else {}
            assert client.get(path, headers=needed).status_code == 200
    knobs = document["components"]["schemas"]["Settings"]["properties"]
    assert knobs.keys() == KNOBS.keys()


def test_a_request_id_is_kept_if_it_is_plain(client: httpx.Client) -> None:
    def echoed(given: str | bytes) -> str:
        return client.get("/live", headers={"x-request-id": given}).headers["x-request-id"]

    assert echoed("abc-1.2:3_4") == "abc-1.2:3_4"
    for bad in ("a b", "x" * 200, "<script>", "é".encode()):
        assert len(echoed(bad)) == 16


def test_python_callers_go_through_the_same_queue(client: httpx.Client, model: Model) -> None:
    server = server_of(client)
    assert server("a") == "A"
    assert server(["a", "b"], suffix="?") == ["A?", "B?"]
    assert asyncio.run(server.predict("c")) == "C"
    assert server.stats()["requests"]["ok"] == 3


def test_in_the_owners_own_cell_an_error_says_what_happened(client: httpx.Client) -> None:
    from serving_kit import ModelFailed

    server = server_of(client)
    with pytest.raises(ModelFailed, match="the model failed on this request") as caught:
        server("raise")
    notes = " ".join(caught.value.__notes__)
    assert "the secret is /home/alice/token" in notes
    assert server.errors()[0].id in notes


def test_every_request_has_exactly_one_outcome(client: httpx.Client, model: Model) -> None:
    model.gate.set()
    bodies = ["a", "", "raise", "nan", "wait", "b"] * 10

    def ask(body: str) -> int:
        return client.post("/", content=body).status_code

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(ask, bodies))
    stats = server_of(client).stats()
    assert sum(stats["requests"].values()) == len(statuses) == 60
    by_status = {200: "ok", 400: "malformed", 500: "failed", 503: "shed"}
    for status, outcome in by_status.items():
        assert statuses.count(status) == stats["requests"][outcome]
    assert stats["queue_depth"] == stats["in_flight"] == 0
    json.dumps(stats)
