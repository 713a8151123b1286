"""POST /: from the body to the answer, over a real connection."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.support import until
from tests.support_http import GatedModel, problem, server_of

pytestmark = pytest.mark.light


def test_text(client: httpx.Client) -> None:
    response = client.post("/", content="test [MASK]")
    assert (response.status_code, response.json()) == (200, "TEST [MASK]")
    assert response.headers["content-type"] == "application/json"


def test_json_object(client: httpx.Client) -> None:
    body = {"inputs": ["a", "b"], "parameters": {"suffix": "!"}}
    assert client.post("/", json=body).json() == ["A!", "B!"]
    assert client.post("/", json={"inputs": "a"}).json() == "A"


def test_requests_are_batched(client: httpx.Client, model: GatedModel) -> None:
    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(client.post, "/", content="wait")
        assert model.inside.wait(10)
        others = [pool.submit(client.post, "/", content=t) for t in "abcd"]
        until(lambda: server_of(client).stats()["queue_depth"] == 4)
        model.gate.set()
        assert [f.result().json() for f in others] == list("ABCD")
        assert first.result().json() == "WAIT"
    assert model.sizes == [1, 4]


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
def test_malformed_requests(
    client: httpx.Client, request_: dict[str, Any], status: int, kind: str | None, words: str
) -> None:
    body = problem(client.post("/", **request_), status)
    assert words in body["error"]
    assert kind in (None, body["error_type"])
    assert client.post("/", content="a").json() == "A"
    outcomes = server_of(client).stats()["requests"]
    assert (outcomes["malformed"] + outcomes["too_large"], outcomes["ok"]) == (1, 1)


def test_full_queue(client: httpx.Client, model: GatedModel) -> None:
    with ThreadPoolExecutor(5) as pool:
        client.post("/", content="a")  # so that the drain rate is known
        waiting = [pool.submit(client.post, "/", content="wait")]
        assert model.inside.wait(10)
        waiting += [pool.submit(client.post, "/", content=t) for t in "abcd"]
        until(lambda: server_of(client).stats()["queue_depth"] == 4)
        refused = client.post("/", content="e")
        assert problem(refused, 503)["error_type"] == "overloaded"
        assert "dropped" not in refused.json(), "it was refused on arrival"
        assert refused.headers["retry-after"] == "1"
        server_of(client).tune(overload_status=429)
        assert problem(client.post("/", content="e"), 429)["title"] == "Too Many Requests"
        model.gate.set()
        assert all(f.result().status_code == 200 for f in waiting)
    assert server_of(client).stats()["requests"]["shed"] == 2


def test_deadline_during_a_model_call(client: httpx.Client, model: GatedModel) -> None:
    late = client.post("/", content="wait", headers={"x-request-timeout-ms": "50"})
    body = problem(late, 504)
    assert (body["error_type"], body["dropped"]) == ("deadline_exceeded", True)
    assert not model.gate.is_set(), "it is still running"
    queued = client.post("/", content="never started", headers={"x-request-timeout-ms": "50"})
    problem(queued, 504)
    model.gate.set()
    assert client.post("/", content="b").json() == "B"
    stats = server_of(client).stats()
    assert (stats["requests"]["expired"], stats["wasted_items"]) == (2, 1)
    assert stats["dropped_items"] == {"expired": 2, "hopeless": 0}
    assert model.sizes == [1, 1], "the one that waited never ran"


def test_bytes_of_all_bodies_together(
    client: httpx.Client, model: GatedModel, monkeypatch: pytest.MonkeyPatch
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


def test_python_callers(client: httpx.Client, model: GatedModel) -> None:
    server = server_of(client)
    assert server("a") == "A"
    assert server(["a", "b"], suffix="?") == ["A?", "B?"]
    assert asyncio.run(server.predict("c")) == "C"
    assert server.stats()["requests"]["ok"] == 3


def test_python_callers_get_the_details_of_an_error(client: httpx.Client) -> None:
    from serving_kit import ModelFailed

    server = server_of(client)
    with pytest.raises(ModelFailed, match="the model failed on this request") as caught:
        server("raise")
    notes = " ".join(caught.value.__notes__)
    assert "the secret is /home/alice/token" in notes
    assert server.errors()[0].id in notes


def test_one_outcome_for_each_request(client: httpx.Client, model: GatedModel) -> None:
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


@pytest.mark.parametrize(
    "timeout", ["1_000", "+1", "1e3", "inf", "nan", "0x10", ".5", "5.", "0", "0.0", "", "١"]
)
def test_malformed_timeouts(server: Any, timeout: str) -> None:
    headers = {b"x-request-timeout-ms": timeout.encode()}
    refused = httpx.post(server.url, content="a", headers=headers)  # type: ignore[arg-type]
    assert refused.status_code == 400
    assert "X-Request-Timeout-Ms" in refused.json()["error"]


@pytest.mark.parametrize("timeout", ["5000", "5000.5", "05000", "999999999999999"])
def test_timeouts(server: Any, timeout: str) -> None:
    assert httpx.post(server.url, content="a", headers={"x-request-timeout-ms": timeout}).json() == "a"
