"""Forms: what `curl -F`, `requests.post(data=...)` and HTML send."""

import io
import json
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.light
Serve = Callable[..., Any]
FORM = "application/x-www-form-urlencoded"


def mark(texts: list[Any], *, mark: str = "") -> list[Any]:
    return [text + mark for text in texts]


@pytest.fixture
def server(serve: Serve) -> Any:
    return serve(mark)


def curl(server: Any, *arguments: str) -> Any:
    """What curl gets, read as JSON."""
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    done = subprocess.run(
        ["curl", "-sS", *arguments, server.url], capture_output=True, text=True, check=True, timeout=60
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["-F", "inputs=rome & paris é"], "rome & paris é"),
        (["-F", "inputs=a", "-F", "inputs=b"], ["a", "b"]),
        (["-F", "inputs=a", "-F", 'parameters={"mark": "!"}'], "a!"),
        (["-F", 'parameters={"mark": "!"}', "-F", "inputs=a;type=text/plain"], "a!"),
        (["-d", "inputs=hello world"], "hello world"),
        (["--data-urlencode", "inputs=rome & paris = é+"], "rome & paris = é+"),
        (["-d", "inputs=a", "-d", "inputs=b"], ["a", "b"]),
        (["-d", "inputs=a", "--data-urlencode", 'parameters={"mark": "!"}'], "a!"),
        # A text is a text, though curl -d says that it is a form.
        (["-d", "rome & paris = 100%+"], "rome & paris = 100%+"),
        (["-d", "question=what&inputs=x"], "question=what&inputs=x"),
        (["-d", "parameters=5"], "parameters=5"),
        (["-d", '{"inputs": "a=b&c"}'], "a=b&c"),
        (["-H", "content-type: text/plain", "-d", "inputs=a"], "inputs=a"),
    ],
)
def test_curl(server: Any, arguments: list[str], answer: Any) -> None:
    assert curl(server, *arguments) == answer


def test_python_clients(server: Any) -> None:
    def post(**body: Any) -> Any:
        return httpx.post(server.url, **body).json()

    assert post(data={"inputs": "rome & paris é"}) == "rome & paris é"
    assert post(data={"inputs": ["a", "b"]}) == ["a", "b"]
    assert post(data={"parameters": '{"mark": "!"}', "inputs": "a"}) == "a!"
    assert post(files={"inputs": (None, "a"), "parameters": (None, '{"mark": "!"}')}) == "a!"


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["-F", "text=a"], 415, 'curl -F "inputs=..." URL'),
        (["-F", "inputs=@-;filename=a.txt"], 415, 'curl -d "..." URL'),
        (["-H", "content-type: multipart/mixed; boundary=x", "-d", "--x--"], 415, "multipart/mixed"),
        (["-F", "inputs=a", "-F", "x=b"], 400, "unknown form field 'x'"),
        (["-F", "inputs=a", "-F", "parameters={mark}"], 400, "in the field parameters: the body is not JSON"),
        (["-F", "inputs=a", "-F", "parameters={}", "-F", "parameters={}"], 400, "parameters twice"),
        (["-F", "inputs=a", "-F", 'parameters={"nope": 1}'], 400, "'nope'"),
        (["-F", "inputs="], 400, "inputs is empty"),
        (["-d", "inputs="], 400, "inputs is empty"),
        (["-d", "inputs=salt & pepper"], 400, "--data-urlencode"),
        (["-d", "inputs=%ff"], 400, "UTF-8"),
        (["-d", "&".join(["inputs=a"] * 1001)], 413, "1000"),
        (["-H", "content-type: multipart/form-data", "-d", "inputs=a"], 400, "multipart form"),
        (["-H", "content-type: multipart/form-data; boundary=x", "-d", "inputs=a"], 400, "multipart form"),
    ],
)
def test_malformed_forms(server: Any, arguments: list[str], status: int, words: str) -> None:
    refused = curl(server, *arguments)
    assert refused["status"] == status
    assert words in refused["error"]
    assert server.stats()["requests"]["ok"] == 0
    assert (
        refused["error_type"]
        == {
            400: "malformed_request",
            413: "request_too_large",
            415: "unsupported_media_type",
        }[status]
    )


def part(name: str, data: bytes) -> bytes:
    return b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (name.encode(), data)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (part("inputs", b"a") + b"--x--\r\n", 200),
        (part("inputs", b"a"), 400),  # without its end
        (part("inputs", b"\xff") + b"--x--\r\n", 400),
        (b"--x\r\nContent-Type: text/plain\r\n\r\na\r\n--x--\r\n", 415),  # a part without a name
        (b"--x\r\n" + b"A: b\r\n" * 1000 + b"\r\na\r\n--x--\r\n", 400),
        (part("inputs", b"a") * 1001 + b"--x--\r\n", 413),
        (part("inputs", b"a" * 2**20) + b"--x--\r\n", 413),
    ],
)
def test_multipart_bodies(server: Any, body: bytes, status: int) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert httpx.post(server.url, content=body, headers=headers).status_code == status


def test_log_of_malformed_forms(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    for body in (b"rubbish", b"--x\r\nA b: c\r\n", part("inputs", b"a") + b"--x--\r\nmore"):
        httpx.post(server.url, content=body, headers=headers)
    assert [record for record in caplog.records if "multipart" in record.name] == []


def test_openapi_document(server: Any) -> None:
    post = httpx.get(f"{server.url}/openapi.json").json()["paths"]["/"]["post"]
    assert {"multipart/form-data", FORM} <= post["requestBody"]["content"].keys()
    assert "415" in post["responses"]


def test_file_of_a_media_task(serve: Serve) -> None:
    pytest.importorskip("torch")
    Image = pytest.importorskip("PIL.Image")
    from tests.support_models import tiny

    def png(color: str) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (32, 32), color).save(file, "png")
        return file.getvalue()

    red, blue = png("red"), png("blue")
    server = serve(tiny("image-classification"))
    alone = httpx.post(server.url, content=red).json()
    for name in ("inputs", "file", "image"):
        assert httpx.post(server.url, files={name: ("a.png", red, "image/png")}).json() == alone
    both = httpx.post(server.url, files=[("file", ("a.png", red)), ("file", ("b.png", blue))]).json()
    assert both == [alone, httpx.post(server.url, content=blue).json()]
    one = httpx.post(server.url, files={"file": red}, data={"parameters": '{"top_k": 1}'}).json()
    assert one == alone[:1]
    empty = httpx.post(server.url, files={"file": ("a.png", b"")})
    assert (empty.status_code, empty.json()["error"]) == (400, "inputs is empty")
    no_file = httpx.post(server.url, files={"parameters": (None, "{}")})
    assert no_file.status_code == 415
    assert "curl -F inputs=@FILE URL" in no_file.json()["error"]
