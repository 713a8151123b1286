"""Images and sound over HTTP: bytes and base64 are read; no string is ever opened or fetched."""

import base64
import io
import json
import struct
import wave
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")
Image = pytest.importorskip("PIL.Image")

import numpy as np

from serving_kit.errors import InputRejected, StartError
from serving_kit.models import media
from serving_kit.models.pipeline import build_pipeline_model
from tests.support_models import IMAGE_TASKS, SOUND_TASKS, image_file, picture, plain, tiny

Serve = Callable[..., Any]
PICTURE = picture()


def wav(samples: np.ndarray, rate: int = 16_000, channels: int = 1) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as sound:
        sound.setnchannels(channels)
        sound.setsampwidth(samples.dtype.itemsize)
        sound.setframerate(rate)
        sound.writeframes(samples.tobytes())
    return out.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a hundred bytes that says it is huge."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize("task", IMAGE_TASKS)
def test_image_as_bytes_or_base64(serve: Serve, task: str) -> None:
    pipe = tiny(task)
    url, want = serve(pipe).url, plain(pipe(PICTURE))
    for kind in ({}, {"content-type": "image/png"}, {"content-type": "application/octet-stream"}):
        assert httpx.post(url, content=image_file(), headers=kind).json() == want
    encoded = text(image_file())
    for value in (encoded, f"data:image/png;base64,{encoded}"):
        assert httpx.post(url, json={"inputs": value}).json() == want
        assert httpx.post(url, json=value).json() == want
    curl = json.dumps({"inputs": [encoded, encoded], "parameters": {}})
    assert httpx.post(url, content=curl, headers={"content-type": "text/plain"}).json() == [want, want]


def test_image_object_from_a_cell(serve: Serve) -> None:
    pipe = tiny("image-classification")
    assert plain(serve(pipe)(PICTURE, top_k=1)) == plain(pipe(PICTURE, top_k=1))


@pytest.mark.parametrize("task", SOUND_TASKS)
def test_sound_comes_as_wav(serve: Serve, task: str) -> None:
    pipe = tiny(task)
    samples = (np.sin(np.arange(8000) / 7) * 9000).astype("<i2")
    url, want = serve(pipe).url, plain(pipe(samples.astype(np.float32) / 2**15))
    assert httpx.post(url, content=wav(samples)).json() == want
    assert httpx.post(url, json={"inputs": text(wav(samples))}).json() == want
    stereo = np.repeat(samples, 2)
    assert httpx.post(url, content=wav(stereo, channels=2)).json() == want
    assert httpx.post(url, content=wav(samples, rate=8000)).status_code == 422


@pytest.mark.parametrize("task", [*IMAGE_TASKS, *SOUND_TASKS])
def test_no_string_is_opened_or_fetched(
    serve: Serve, task: str, tmp_path: Path, fetched: tuple[str, list[str]]
) -> None:
    address, asked = fetched
    secret = tmp_path / "abcd"  # a name that is base64, too
    secret.write_bytes(image_file() if task in IMAGE_TASKS else wav(np.zeros(8000, "<i2")))
    server = serve(tiny(task))
    strings: list[Any] = [str(secret), secret.name, f"file://{secret}", address, f"data:image/png,{address}"]
    for value in [*strings, *({"image": each} for each in strings), {"path": str(secret)}, 7, [[address]]]:
        answer = httpx.post(server.url, json={"inputs": value})
        assert answer.status_code == 422, value
        assert str(tmp_path) not in answer.text
    for body in strings:
        assert httpx.post(server.url, content=body).status_code == 422
        assert httpx.post(server.url, json=body).status_code == 422
    timeout = {"inputs": text(secret.read_bytes()), "parameters": {"timeout": 1}}
    assert httpx.post(server.url, json=timeout).status_code == 400
    assert asked == []
    assert server.stats()["requests"]["failed"] == 0


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (bomb(100_000, 100_000), "most is 50,000,000 pixels"),
        (bomb(10_000, 10_000), "most is 50,000,000 pixels"),
        (bomb(1000, 1000), "not an image that can be read"),
        (image_file()[:60], "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
        (b"<svg/>", "not an image"),
        (b"\0" * 100, "not an image"),
    ],
)
def test_bad_image(serve: Serve, data: bytes, complaint: str) -> None:
    server = serve(tiny("image-classification"))
    refused = httpx.post(server.url, content=data)
    assert refused.status_code == 422
    assert complaint in refused.json()["error"]
    assert httpx.post(server.url, content=image_file()).status_code == 200


def test_image_above_the_limit_for_text(serve: Serve) -> None:
    noise = np.random.default_rng(1).integers(0, 255, (900, 900, 3), dtype=np.uint8)
    body = image_file(Image.fromarray(noise))
    assert len(body) > 2**20
    assert httpx.post(serve(tiny("image-classification")).url, content=body).status_code == 200


def test_sound_is_bounded_in_length() -> None:
    with pytest.raises(InputRejected, match="60 seconds at most"):
        media.sound(wav(np.zeros(61 * 8000, "u1"), rate=8000))
    with pytest.raises(InputRejected, match="must have samples"):
        media.sound(wav(np.zeros(0, "<i2")))


@pytest.mark.parametrize(("kind", "one"), [("u1", 255), ("<i2", 2**15 - 1), ("<i4", 2**31 - 1)])
def test_sample_widths(kind: str, one: int) -> None:
    """Samples of every width are scaled to -1..1."""
    heard = media.sound(wav(np.array([one, 0], kind), rate=4))
    assert heard["raw"].dtype == np.float32
    assert heard["raw"][0] == pytest.approx(1, abs=0.01)
    assert heard["raw"][1] == (-1 if kind == "u1" else 0)


_starts = [
    b"",
    image_file(),
    image_file(kind="GIF"),
    image_file(kind="JPEG"),
    image_file(kind="TIFF"),
    wav(np.zeros(9, "<i2")),
]


@given(
    start=st.sampled_from(_starts),
    cut=st.integers(0, 400),
    noise=st.binary(max_size=60),
    encode=st.booleans(),
)
def test_any_bytes_decode_or_are_refused(start: bytes, cut: int, noise: bytes, encode: bool) -> None:
    data = start[:cut] + noise + start[cut + len(noise) :]
    for read in (media.image, media.sound):
        try:
            read(text(data) if encode else data)
        except InputRejected as error:
            assert len(str(error)) < 200


@pytest.mark.parametrize(
    "value", [None, 1, [], {}, {"raw": [1.0], "sampling_rate": 8}, "é", "a b", "data:,x"]
)
def test_neither_bytes_nor_base64(value: Any) -> None:
    for read in (media.image, media.sound):
        with pytest.raises(InputRejected, match="never opened"):
            read(value)


def test_unknown_pipeline_that_opens_files() -> None:
    import copy

    pipe = copy.copy(tiny("image-classification"))
    pipe.task = "document-question-answering"
    with pytest.raises(StartError, match="may open the paths and addresses that clients send"):
        build_pipeline_model(pipe)
