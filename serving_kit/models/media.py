"""Images and sound as clients send them, turned into what pipelines take.

    the bytes themselves as the body            a file, as `curl --data-binary @cat.png` sends it
    base64 in JSON, or a data: URL              what `huggingface_hub.InferenceClient` sends

A pipeline that is given a string opens it as a file or fetches it as a URL. So no string reaches one:
here a string is base64 or it is rejected. Decoders get a few plain formats only, and sizes are bounded
before anything is unpacked.

Everything here runs on the model thread. Not here: which tasks take what (`tasks.py`).
"""

from __future__ import annotations

import base64
import binascii
import io
import wave

from serving_kit.errors import InputRejected

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # no PostScript, whose decoder is a program
_MOST_PIXELS = 50_000_000  # 150 MB once unpacked; below the size at which Pillow warns
_MOST_SECONDS = 60  # attention over sound grows with the square of its length
_SAMPLES = {1: "u1", 2: "<i2", 4: "<i4"}  # by bytes: how WAV has them
_NO_STRINGS = "as its bytes, or in JSON as base64 or a data: URL; a path or an address is never opened"


def image(value: object) -> object:
    """A Pillow image, unpacked. A cell may also pass one, or a numpy array.

    Raises:
        InputRejected: it is no image, is broken or has too many pixels.
    """
    if hasattr(value, "convert") or hasattr(value, "shape"):
        return value
    from PIL import Image

    data = _data(value, "an image")
    try:
        picture = Image.open(io.BytesIO(data), formats=_FORMATS)
        pixels = picture.width * picture.height
        if pixels <= _MOST_PIXELS:
            picture.load()
            return picture
    except Exception as error:  # Pillow's decoders raise a dozen kinds of exceptions
        if "DecompressionBomb" not in type(error).__name__:
            raise InputRejected(f"this is not an image that can be read ({', '.join(_FORMATS)})") from None
    raise InputRejected(f"the image is too large; the most is {_MOST_PIXELS:,} pixels")


def sound(value: object) -> object:
    """One channel of a WAV file: `{"raw": float32 of shape (samples,), "sampling_rate": Hz}`.

    A cell may also pass a numpy array, or such a dict.

    Raises:
        InputRejected: it is not WAV with 8, 16 or 32 bits, or is too long.
    """
    if hasattr(value, "shape"):
        return value
    if isinstance(value, dict) and hasattr(value.get("raw"), "shape"):
        return dict(value)  # pipelines take it apart
    import numpy as np

    data = _data(value, "sound")
    try:
        with wave.open(io.BytesIO(data)) as file:
            rate, channels, width = file.getframerate(), file.getnchannels(), file.getsampwidth()
            frames = file.readframes(_MOST_SECONDS * rate + 1)
        samples = np.frombuffer(frames, _SAMPLES[width]).astype(np.float32)
        samples = samples.reshape(-1, channels).mean(axis=1)
    except Exception:  # for a wrong header `wave` raises half a dozen kinds
        raise InputRejected("this is not sound that can be read (WAV with 8, 16 or 32 bits)") from None
    if not 0 < len(samples) <= _MOST_SECONDS * rate:
        raise InputRejected(f"the sound must have samples, and {_MOST_SECONDS} seconds at most")
    scale = np.float32(2 ** (8 * width - 1))
    return {"raw": samples / scale - (width == 1), "sampling_rate": rate}


def _data(value: object, what: str) -> bytes:
    """The bytes of a body, or those that a string encodes."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        head, comma, rest = value.partition(",")
        if head.startswith("data:"):
            value = rest if comma and head.endswith(";base64") else "?"
        try:
            return base64.b64decode(value.encode("ascii"), validate=True)
        except (binascii.Error, UnicodeEncodeError):
            pass
    raise InputRejected(f"inputs must be {what}: {_NO_STRINGS}")
