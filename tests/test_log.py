"""The log of a server, and the list of failures."""

import contextlib
import ctypes
import io
import itertools
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import serving_kit
from serving_kit.log import MOST_LINES, JsonFormatter, Limiter
from tests.support import REPOSITORY, until
from tests.support_http import answers, free_port

pytestmark = pytest.mark.light
Serve = Callable[..., Any]
Records = list[logging.LogRecord]


def fail_on_request(texts: list[str]) -> list[str]:
    """Upper case; "raise" raises, and "large" raises a text of a megabyte."""
    if "raise" in texts:
        raise LookupError("deep inside")
    if "large" in texts:
        raise ValueError("begin" + "x" * 1_000_000 + "end")
    return [text.upper() for text in texts]


@pytest.fixture
def records() -> Iterator[Records]:
    """What a handler on the logger `serving_kit` gets, from INFO on."""
    kept: Records = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            kept.append(record)

    logger, handler = logging.getLogger("serving_kit"), Keep()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield kept
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def fields(record: logging.LogRecord) -> dict[str, Any]:
    return record.__dict__


def with_outcome(records: Records, outcome: str) -> Records:
    return [each for each in records if fields(each).get("outcome") == outcome]


# -- the lines ---------------------------------------------------------------------------------------


def test_failed_request(serve: Serve, records: Records) -> None:
    """One line, with incident, times and traceback."""
    server = serve(fail_on_request)
    answer = httpx.post(server.url, content="raise", headers={"x-request-id": "mine-1"})
    assert answer.status_code == 500
    [record] = records
    line = logging.Formatter().format(record)
    assert (record.name, record.levelname) == ("serving_kit", "ERROR")
    found = fields(record)
    assert found["incident"] == answer.json()["incident"]
    assert found["request_id"] == "mine-1"
    assert (found["outcome"], found["items"], found["server"]) == ("failed", 1, "default")
    assert 0 <= found["model_ms"] <= found["latency_ms"] < 60_000
    assert found["queue_ms"] >= 0
    assert found["error"].startswith("LookupError at test_log.py:")
    for word in (
        found["incident"],
        "request_id=mine-1",
        "latency_ms=",
        "Traceback",
        "LookupError: deep inside",
    ):
        assert word in line
    assert "deep inside" not in record.getMessage(), (
        "an exception may quote a client: only the traceback does"
    )


def test_client_errors_at_info(serve: Serve, records: Records) -> None:
    """Without text of the client. Answered requests are not logged."""
    server = serve(fail_on_request)
    assert httpx.post(server.url, content="fine").status_code == 200
    assert records == []
    body = '{"inputs": "a", "parameters": {"evil\\nERROR": 1}}'
    assert (
        httpx.post(server.url, content=body, headers={"content-type": "application/json"}).status_code == 400
    )
    [record] = records
    assert (record.levelname, fields(record)["outcome"]) == ("INFO", "malformed")
    assert "evil" not in logging.Formatter().format(record)


def test_shed_and_expired_at_warning(serve: Serve, records: Records) -> None:
    gate, inside = threading.Event(), threading.Event()

    def wait(texts: list[str]) -> list[str]:
        inside.set()
        assert gate.wait(30)
        return texts

    server = serve(wait, max_queue_size=1, max_batch_size=1)
    with httpx.Client(base_url=server.url, timeout=30) as client:
        late = client.post("/", content="a", headers={"x-request-timeout-ms": "50"})
        assert inside.wait(10)
        assert late.status_code == 504
        waiting = threading.Thread(target=lambda: httpx.post(server.url, content="b", timeout=30))
        waiting.start()
        until(lambda: server.stats()["queue_depth"] == 1)
        assert client.post("/", content="c").status_code == 503
        gate.set()
        waiting.join(30)
    [expired] = with_outcome(records, "expired")
    [shed] = with_outcome(records, "shed")
    assert (expired.levelname, shed.levelname) == ("WARNING", "WARNING")
    assert "50 ms" in fields(expired)["reason"]
    assert "the queue is full" in fields(shed)["reason"]


def test_failed_batch(serve: Serve, records: Records) -> None:
    """A line for each request, one traceback for each incident."""
    server = serve(lambda texts: [], max_wait_ms=200)  # the wrong number of outputs fails the batch
    clients = [
        threading.Thread(target=httpx.post, args=(server.url,), kwargs={"content": text, "timeout": 30})
        for text in "abc"
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join(30)
    until(lambda: len(with_outcome(records, "failed")) == 3)
    failed = with_outcome(records, "failed")
    incidents = {fields(each)["incident"] for each in failed}
    assert sum("Traceback" in logging.Formatter().format(each) for each in failed) == len(incidents)


def test_lines_of_one_cause_are_bounded(serve: Serve, records: Records) -> None:
    server = serve(fail_on_request)
    server("fine")  # so that the breaker stays closed
    for _ in range(4 * MOST_LINES):
        assert httpx.post(server.url, content="raise").status_code == 500
    assert httpx.post(server.url, content="large").status_code == 500
    assert len(with_outcome(records, "failed")) == MOST_LINES + 1, "another cause has lines of its own"
    server.stop()
    [summary] = [each for each in records if "suppressed" in fields(each)]
    assert (summary.levelname, fields(summary)["suppressed"]) == ("ERROR", 3 * MOST_LINES)
    assert "LookupError" in fields(summary)["cause"]


def test_breaker_opens_and_closes(serve: Serve, records: Records) -> None:
    broken = threading.Event()
    broken.set()

    def model(texts: list[str]) -> list[str]:
        if broken.is_set():
            raise LookupError
        return texts

    server = serve(model)
    with httpx.Client(base_url=server.url, timeout=30) as client:
        # For a function it takes 10 s and 5 different inputs until the breaker opens.
        numbers = itertools.count()
        until(lambda: client.post("/", content=f"a{next(numbers)}").status_code == 503, timeout=40)
        [opened] = [each for each in records if fields(each).get("breaker") == "open"]
        assert opened.levelname == "WARNING"
        assert "and the last failed with LookupError" in fields(opened)["reason"]
        assert with_outcome(records, "unavailable")
        assert 'serving_kit_breaker_state{state="open"} 1.0' in client.get("/metrics").text
        broken.clear()
        until(lambda: client.post("/", content="a").status_code == 200, timeout=30)
    [closed] = [each for each in records if fields(each).get("breaker") == "closed"]
    assert closed.levelname == "INFO"


def test_model_thread_died(serve: Serve, records: Records) -> None:
    server = serve(fail_on_request)
    server("a")
    [thread] = [each for each in threading.enumerate() if each.name == "serving-kit-model"]
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident or 0), ctypes.py_object(MemoryError)
    )
    with contextlib.suppress(serving_kit.ServingError):
        server("b")  # wakes it
    until(lambda: not thread.is_alive())
    until(lambda: any("model thread died" in each.getMessage() for each in records))
    [died] = [each for each in records if "model thread died" in each.getMessage()]
    assert died.levelname == "ERROR"
    assert "MemoryError" in logging.Formatter().format(died)
    assert until(lambda: server("c")) == "C"


def test_settings_changed(serve: Serve, records: Records) -> None:
    server = serve(fail_on_request, max_batch_size=8)
    server.tune(max_batch_size=4)
    token = {"authorization": f"Bearer {server.token}"}
    assert httpx.patch(f"{server.url}/settings", json={"max_wait_ms": 2}, headers=token).status_code == 200
    cell, http = (fields(each) for each in records)
    assert (cell["by"], cell["setting"], cell["before"], cell["after"]) == ("tune()", "max_batch_size", 8, 4)
    assert (http["setting"], http["before"], http["after"]) == ("max_wait_ms", 0.0, 2.0)
    assert http["by"].startswith("HTTP client 127.0.0.1:")
    assert all(each.levelname == "INFO" for each in records)


@pytest.mark.parametrize("name", ["self", "by"])
def test_setting_named_like_an_argument(serve: Serve, name: str) -> None:
    """Names of `tune`'s own arguments are unknown settings."""
    server = serve(fail_on_request)
    token = {"authorization": f"Bearer {server.token}"}
    answer = httpx.patch(f"{server.url}/settings", json={name: 1}, headers=token)
    assert (answer.status_code, "there is no setting" in answer.text) == (422, True)


def test_server_replaced(serve: Serve, records: Records) -> None:
    first = serve(fail_on_request)
    second = serve(fail_on_request, port=0)
    assert second.url == first.url
    [record] = [each for each in records if "was replaced" in each.getMessage()]
    assert (record.levelname, fields(record)["url"]) == ("INFO", second.url)


def test_root_handlers(serve: Serve) -> None:
    """A handler that raises fails no request."""

    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError("disk full")

    root, stream = logging.getLogger(), io.StringIO()
    handlers = [logging.StreamHandler(stream), Broken()]
    for handler in handlers:
        root.addHandler(handler)
    try:
        server = serve(fail_on_request)
        assert httpx.post(server.url, content="raise").status_code == 500
        until(lambda: "LookupError: deep inside" in stream.getvalue())
    finally:
        for handler in handlers:
            root.removeHandler(handler)


def test_unconfigured_logging_prints_nothing(serve: Serve, capfd: pytest.CaptureFixture[str]) -> None:
    server = serve(fail_on_request)
    capfd.readouterr()
    assert httpx.post(server.url, content="raise").status_code == 500
    assert any("LookupError: deep inside" in line for line in server.logs())
    server.stop()
    assert capfd.readouterr() == ("", "")


# -- the limiter -------------------------------------------------------------------------------------


def test_limiter_counts_each_cause() -> None:
    limiter = Limiter(most=2, period_s=60)
    assert [limiter.admits(20, "a", now) for now in (0, 1, 2, 3)] == [True, True, False, False]
    assert limiter.admits(20, "b", 3)
    assert limiter.ended(59) == []
    assert limiter.ended(60) == [(20, "a", 2)]
    assert limiter.ended(61) == []
    assert limiter.admits(20, "a", 61)
    assert limiter.ended(1000) == [], "what was not left out is not reported"


def test_limiter_bounds_number_of_causes() -> None:
    limiter = Limiter(most=1, period_s=60)
    admitted = sum(limiter.admits(20, f"cause {number}", 0) for number in range(10_000))
    assert admitted < 300
    assert sum(left_out for _, _, left_out in limiter.ended(60)) == 10_000 - admitted


# -- the list of failures ----------------------------------------------------------------------------


def test_errors_route_needs_token(serve: Serve) -> None:
    server = serve(fail_on_request)
    with httpx.Client(base_url=server.url, timeout=30) as client:
        told = [
            client.post("/", content=text, headers={"x-request-id": name}).json()["incident"]
            for text, name in (("raise", "first"), ("large", "second"))
        ]
        assert client.get("/errors").status_code == 401
        assert client.get("/errors", headers={"authorization": "Bearer wrong"}).status_code == 401
        listed = client.get("/errors", headers={"authorization": f"Bearer {server.token}"})
        assert listed.headers["cache-control"] == "no-store"
        second, first = listed.json()
        described = client.get("/openapi.json").json()["paths"]["/errors"]["get"]
    assert [first["id"], second["id"]] == told
    assert (first["request_ids"], second["request_ids"]) == (["first"], ["second"])
    assert first["outcome"] == "failed"
    assert "LookupError: deep inside" in first["traceback"]
    assert first["wall"] <= second["wall"]
    assert described["security"] == [{"token": []}]


def test_long_error_texts_are_shortened(serve: Serve) -> None:
    server = serve(fail_on_request, expose_errors=True)
    answer = httpx.post(server.url, content="large")
    assert len(answer.content) < 20_000
    [incident] = server.errors()
    for text in (incident.error, incident.traceback):
        assert len(text) < 25_000
        assert "characters left out" in text
        assert text.rstrip().endswith("end")
    assert incident.error.startswith("ValueError: begin")


def test_series_bounded_by_history(serve: Serve) -> None:
    server = serve(fail_on_request)
    assert len(server.stats(series=1_000_000)["series"]) == 300
    assert "series" not in server.stats(series=-1)


# -- outside a notebook ------------------------------------------------------------------------------


def start(command: list[str], folder: Path, **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{folder}", **variables}
    return subprocess.Popen(
        command, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=folder, env=environment
    )


def finish(process: subprocess.Popen[str]) -> str:
    process.terminate()
    _, written = process.communicate(timeout=30)
    return written


def test_uvicorn_traceback_on_stderr(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(
        "import serving_kit\n\n"
        "def f(texts):\n    raise LookupError('deep inside')\n\n"
        "app = serving_kit.create_app(f)\n"
    )
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with start([sys.executable, "-m", "uvicorn", "server:app", "--port", str(port)], tmp_path) as process:
        until(lambda: answers(url), timeout=60)
        answer = httpx.post(url, content="x")
        owners = httpx.get(f"{url}/errors")
        written = finish(process)
    assert f"incident={answer.json()['incident']}" in written
    assert f"request_id={answer.headers['x-request-id']}" in written
    assert "LookupError: deep inside" in written
    assert owners.status_code == 403, "without a token the list is closed"


def test_json_formatter() -> None:
    record = logging.makeLogRecord(
        {"name": "serving_kit", "levelname": "ERROR", "msg": "request failed", "incident": "ab", "items": 2}
    )
    record.exc_text = 'Traceback\n  "quoted"'
    line = JsonFormatter().format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert found.pop("ts").endswith("+00:00")
    assert found == {
        "level": "error",
        "logger": "serving_kit",
        "message": "request failed",
        "incident": "ab",
        "items": 2,
        "traceback": 'Traceback\n  "quoted"',
    }
