"""Errors as statuses and problem documents."""

from typing import Any

import httpx
import pytest

from serving_kit.errors import ClientGone, Overloaded, RequestTooLarge
from serving_kit.http.problems import error_problem, problem_json
from serving_kit.records import Outcome
from tests.support_http import problem, server_of

pytestmark = pytest.mark.light


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/nothing", 404, "GET /openapi.json lists the rest"),
        ("POST", "/health", 405, "GET"),
        ("DELETE", "/", 405, "takes"),
        ("PUT", "/settings", 405, "takes"),
    ],
)
def test_unknown_route_or_method(
    client: httpx.Client, method: str, path: str, status: int, words: str
) -> None:
    assert words in problem(client.request(method, path), status)["error"]


def test_incident_of_a_failed_model(client: httpx.Client) -> None:
    body = problem(client.post("/", content="raise"), 500)
    assert "secret" not in body["error"]
    (incident,) = server_of(client).errors()
    assert incident.id == body["incident"]
    assert incident.id in body["error"]
    assert "the secret is /home/alice/token" in incident.error
    assert "in __call__" in incident.traceback
    assert incident.outcome is Outcome.FAILED


def test_expose_errors(client: httpx.Client) -> None:
    server_of(client).tune(expose_errors=True)
    response = client.post("/", content="raise")
    assert response.status_code == 500
    assert "ValueError: the secret is /home/alice/token" in response.json()["error"]
    assert "Traceback" not in response.text


def test_answer_that_is_not_json(client: httpx.Client) -> None:
    body = problem(client.post("/", content="nan"), 500)
    assert "cannot be written as JSON" in body["error"]
    (incident,) = server_of(client).errors()
    assert incident.id == body["incident"]
    assert "not JSON compliant" in incident.error


def test_incident_of_a_failed_route(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving_kit.http.openapi.document", lambda *_: 1 / 0)
    body = problem(client.get("/openapi.json"), 500)
    assert server_of(client).errors()[0].id == body["incident"]
    assert "ZeroDivisionError" in server_of(client).errors()[0].error


def test_status_of_a_new_kind_of_error() -> None:
    """It has that of its parent."""

    class NewKind(RequestTooLarge):
        pass

    found = error_problem(NewKind("too much"), "id", None)
    assert (found.status, found.error_type, found.text) == (413, "request_too_large", "too much")


@pytest.mark.parametrize(("seconds", "header"), [(None, None), (0.1, "1"), (2.5, "3"), (1e6, "30")])
def test_retry_after(seconds: float | None, header: str | None) -> None:
    found = error_problem(Overloaded("full", retry_after=seconds), "id", None)
    assert found.headers.get("retry-after") == header


def test_client_closed_request() -> None:
    document: Any = problem_json(error_problem(ClientGone("it left"), "id", None))[0]
    assert (document["status"], document["title"]) == (499, "Client Closed Request")
    assert "incident" not in document
