"""Requests that ask for another protocol are answered in HTTP/1.1, with their body."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.support import REPOSITORY, until
from tests.support_http import NOTEBOOK_AND_COMMAND, answers, ended, free_port, read_response, read_to_end

TEXT = b"a [MASK]."
# As Java 17's HttpClient and curl 7.88 --http2 -d send it.
JAVA = (
    b"POST / HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nContent-Length: 9\r\nHost: 127.0.0.1\r\n"
    b"HTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAAAAYABgAA\r\nUpgrade: h2c\r\n"
    b"User-Agent: Java-http-client/17.0.15\r\n\r\n" + TEXT
)
CURL_HEAD = (
    b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: curl/7.88.1\r\nAccept: */*\r\n"
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"
)
FORM = b"Content-Type: application/x-www-form-urlencoded\r\n\r\n"
CURL = CURL_HEAD + b"Content-Length: 9\r\n" + FORM + TEXT
CHUNKED = CURL_HEAD + b"Transfer-Encoding: chunked\r\n" + FORM + b"4\r\na [M\r\n5\r\nASK].\r\n0\r\n\r\n"


@pytest.mark.parametrize("port", NOTEBOOK_AND_COMMAND, indirect=True)
@pytest.mark.parametrize("request_", [JAVA, CURL, CHUNKED], ids=["java", "curl", "chunked"])
def test_upgrade_to_http2(port: int, request_: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
        for _ in range(2):  # the connection goes on
            raw.sendall(request_)
            status, body = read_response(raw)
            assert status == 200, body
            assert b"a " in body


@pytest.mark.parametrize("port", NOTEBOOK_AND_COMMAND, indirect=True)
def test_body_after_the_head(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
        for end in (20, len(JAVA) - len(TEXT), len(JAVA) - 2):
            raw.sendall(JAVA[:end])
            with socket.create_connection(("127.0.0.1", port), timeout=20) as other:  # meanwhile
                other.sendall(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert read_response(other)[0] == 200
            raw.sendall(JAVA[end:])
            assert read_response(raw)[0] == 200


@pytest.mark.parametrize("port", NOTEBOOK_AND_COMMAND, indirect=True)
def test_100_continue(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
        raw.sendall(CURL_HEAD + b"Expect: 100-continue\r\nContent-Length: 9\r\n" + FORM)
        assert raw.recv(1000).startswith(b"HTTP/1.1 100 ")
        raw.sendall(TEXT)
        assert read_response(raw)[0] == 200


@pytest.mark.parametrize("port", [NOTEBOOK_AND_COMMAND[0]], indirect=True)
def test_pipelined_requests(port: int) -> None:
    plain = b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n"
    last = JAVA.replace(b"Connection: Upgrade", b"Connection: close, Upgrade")
    with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
        raw.sendall(JAVA + plain + CURL + last)
        data = read_to_end(raw)
    assert data.count(b"HTTP/1.1 200 ") == 4
    assert data.index(TEXT) < data.index(b'{"status":"live"}') < data.rindex(TEXT)


@pytest.mark.parametrize("port", [NOTEBOOK_AND_COMMAND[0]], indirect=True)
@pytest.mark.parametrize(
    "request_",
    [
        b"CONNECT example.org:80 HTTP/1.1\r\nHost: example.org\r\n\r\n",
        b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
    ids=["connect", "connect and upgrade", "http2 with prior knowledge"],
)
def test_connect_and_http2_get_400(port: int, request_: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
        raw.sendall(request_)
        data = read_to_end(raw)
    assert data.startswith(b"HTTP/1.1 400 ")
    assert data.count(b"HTTP/1.1 ") == 1


@pytest.mark.light
def test_plain_uvicorn(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(
        "import serving_kit\n\napp = serving_kit.create_app(lambda texts: texts)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}"}

    def ask(*options: str) -> tuple[int, bytes]:
        port = free_port()
        arguments = [sys.executable, "-m", "uvicorn", "server:app", "--port", str(port), *options]
        with subprocess.Popen(
            arguments,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=tmp_path,
            env=environment,
        ) as process:
            try:
                until(lambda: answers(f"http://127.0.0.1:{port}"), timeout=30)
                assert httpx.post(f"http://127.0.0.1:{port}", content="a").json() == "a"
                with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
                    raw.sendall(JAVA)
                    return read_response(raw)
            finally:
                ended(process)

    assert ask("--http", "h11") == (200, b'"a [MASK]."')
    status, body = ask("--http", "httptools")
    assert status == 400
    assert b"--http h11" in body
