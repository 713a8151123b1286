"""Hostile bodies over a real connection: each gets a 4xx with the reason, and the server goes on."""

import gzip
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving_kit.errors import MalformedRequest
from serving_kit.http.dialects import DIALECTS
from serving_kit.http.predict import decode_body
from serving_kit.models.tasks import TASKS

pytestmark = pytest.mark.light
Serve = Callable[..., Any]
JSON = {"content-type": "application/json"}
PREDICTIONS = [prediction for dialect in DIALECTS for prediction in dialect.predictions]


def echo(texts: list[Any], *, mark: Any = None) -> list[Any]:
    return texts


def nested(depth: int) -> bytes:
    return b'{"inputs": ' + b"[" * depth + b"]" * depth + b"}"


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (nested(100), "nested deeper than 32"),
        (nested(100_000), "nested deeper than 32"),
        (b'{"inputs": "a", "parameters": {"mark": 1e999}}', "too large"),
        (b'{"inputs": -1e999}', "too large"),
        (b'{"inputs": 1' + b"0" * 5000 + b"}", "too many digits"),
        (b'{"inputs": NaN}', "no NaN"),
        (b'{"inputs": [1, Infinity]}', "no Infinity"),
        (b'{"inputs": "\\ud800"}', "surrogate"),
        (b'{"inputs": {"\\uDC00": 1}}', "surrogate"),
        (b'{"inputs": "a", "inputs": "b"}', "same member twice"),
        (b'{"inputs": "a", "parameters": {"mark": 1, "mark": 2}}', "same member twice"),
        (b'\xef\xbb\xbf{"inputs": "a"}', "not JSON"),
        ('{"inputs": "a"}'.encode("utf-16"), "not UTF-8"),
        (json.dumps({"inputs": ["a"] * 100_000}).encode(), "100000 inputs in one request; the most is 256"),
    ],
)
def test_hostile_json(serve: Serve, body: bytes, complaint: str) -> None:
    server = serve(echo)
    refused = httpx.post(server.url, content=body, headers=JSON)
    assert 400 <= refused.status_code < 500
    assert complaint in refused.json()["error"]
    assert len(refused.content) < 1000
    assert httpx.post(server.url, content="a").json() == "a"
    assert server.stats()["requests"]["failed"] == 0


def test_compressed_body(serve: Serve) -> None:
    server = serve(echo)
    bomb = gzip.compress(b"a" * 2**20)
    for encoding in ("gzip", "GZIP", "br", "deflate, gzip"):
        headers = {"content-encoding": encoding}
        assert httpx.post(server.url, content=bomb, headers=headers).status_code == 400
    assert httpx.post(server.url, content=bomb).status_code == 400, "as it is, it is no text"


def test_chunked_body_without_an_end(serve: Serve) -> None:
    server = serve(echo, max_body_bytes=100_000)
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=10) as sock:
        sock.sendall(b"POST / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(11):
            sock.sendall(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
        answer = sock.recv(2000)  # before the last chunk, which is never sent
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"problem+json" in answer


def test_body_that_trickles(serve: Serve) -> None:
    server = serve(echo, timeout_ms=300)
    begun = time.monotonic()
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=10) as sock:
        sock.sendall(b"POST / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n")
        sock.settimeout(0.02)
        answer = b""
        while not answer and time.monotonic() - begun < 10:
            sock.sendall(b"1\r\nx\r\n")
            try:
                answer = sock.recv(100)
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 408")
    assert server.stats()["requests"]["malformed"] == 1


def test_metric_labels(serve: Serve) -> None:
    server = serve(echo)

    def labels() -> set[str]:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return {line.rpartition(" ")[0] for line in lines if not line.startswith("#")}

    before = labels()
    for word in ("zebra", "<b>", "x" * 50):
        httpx.post(server.url, content=word, headers={"x-request-id": word, "user-agent": word})
        httpx.post(f"{server.url}/{word}?{word}={word}")
        httpx.request(word if word == "zebra" else "PUT", server.url)
    assert labels() == before
    assert not any("zebra" in each for each in labels())


_inner = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
_bodies = (
    st.binary(max_size=200)
    | st.text(max_size=100).map(str.encode)
    | _inner.map(lambda each: json.dumps(each).encode())
    | st.fixed_dictionaries(
        {"inputs": _inner}, optional={"parameters": _inner, "options": _inner, "stream": _inner}
    ).map(lambda each: json.dumps(each).encode())
)
_types = st.sampled_from(
    ["", "application/json", "text/plain; charset=utf-16", "a/b+json", "image/png", "multipart/form-data"]
) | st.text(max_size=30)


@given(body=_bodies, content_type=_types, task=st.sampled_from([*TASKS, "function"]))
@settings(max_examples=500)
def test_any_body_of_any_type(body: bytes, content_type: str, task: str) -> None:
    try:
        _, request = decode_body(PREDICTIONS, body, {b"content-type": content_type.encode()}, task)
    except MalformedRequest as error:
        assert 0 < len(str(error)) < 300
        return
    assert request.values
    if task in TASKS:
        try:
            TASKS[task].check_parameters(request.parameters)
            for value in request.values:
                TASKS[task].check_input(value)
        except MalformedRequest as error:
            assert 0 < len(str(error)) < 1000
