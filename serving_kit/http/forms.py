"""Forms: the fields of `curl -F`, `curl -d inputs=...` and browsers as the object that JSON clients send.

A field `inputs` is the input, and several of them are a list. Sizes are bounded by that of the body, the
number of fields here.

Not here: what the object means (`dialects/huggingface.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from serving_kit.errors import MalformedRequest, RequestTooLarge, UnsupportedMediaType
from serving_kit.http.strict_json import decode_text, parse_json

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MEMBERS = frozenset({"inputs", "parameters", "options"})  # of the JSON object, and fields of a form
_URLENCODED_STARTS = tuple(f"{name}=".encode() for name in sorted(MEMBERS))
_MAX_FIELDS = 1000
_SILENT = logging.Logger(__name__, logging.CRITICAL)  # a bad form is reported to its client only
_TEXT_COMMANDS = 'send the text itself, curl -d "..." URL, or as a field, curl -F "inputs=..." URL'
_FILE_COMMANDS = "send the file itself, curl --data-binary @FILE URL, or in a form, curl -F inputs=@FILE URL"


def read_urlencoded(body: bytes) -> dict[str, object] | None:
    """The form as an object; None: the body is a text, which `curl -d` has labelled as a form.

    Raises:
        MalformedRequest: unknown or repeated fields, or not UTF-8.
        RequestTooLarge: too many fields.
    """
    if not body.startswith(_URLENCODED_STARTS):
        return None
    if body.count(b"&") >= _MAX_FIELDS:
        raise RequestTooLarge(f"the form has too many fields; the most is {_MAX_FIELDS}")
    try:
        fields = parse_qsl(decode_text(body), keep_blank_values=True, errors="strict")
    except UnicodeDecodeError:
        raise MalformedRequest("the form is not UTF-8 under its percent signs") from None
    if "inputs" not in dict(fields):
        return None
    return _as_object(fields, "; an & in a text is written %26 in a form: curl --data-urlencode 'inputs=...'")


def read_multipart(body: bytes, content_type: bytes, *, media: bool) -> dict[str, object]:
    """The form as an object. Where inputs are media, each file in it is an input, whatever its name.

    Raises:
        MalformedRequest: no form, not complete, or with unknown fields.
        RequestTooLarge: too many fields.
        UnsupportedMediaType: another kind of multipart body, or a form that this task does not take.
    """
    fields = [_field(disposition, data, media) for disposition, data in _parts(body, content_type)]
    if "inputs" not in dict(fields):
        commands = _FILE_COMMANDS if media else _TEXT_COMMANDS
        raise UnsupportedMediaType(f"the form has no field inputs; {commands}")
    return _as_object(fields)


def _parts(body: bytes, content_type: bytes) -> list[tuple[bytes, bytes]]:
    """Of each part the `Content-Disposition` and the bytes."""
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data":
        raise UnsupportedMediaType(f"this server takes no {kind.decode('latin-1')[:60]}")
    parts = _Parts()
    try:
        parser = MultipartParser(options.get(b"boundary", b""), parts.callbacks())
        parser.logger = _SILENT
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise MalformedRequest("the body is not the multipart form that its content type announces") from None
    if not parts.complete:
        raise MalformedRequest("the multipart form has no end")
    return parts.found


def _field(disposition: bytes, data: bytes, media: bool) -> tuple[str, str | bytes]:
    """Name and value of one part."""
    _, options = parse_options_header(disposition)
    name = decode_text(options.get(b"name", b""))
    if b"filename" not in options:
        return name, decode_text(data)
    if not media:
        raise UnsupportedMediaType(f"this task takes no files; {_TEXT_COMMANDS}")
    if not data:
        raise MalformedRequest("inputs is empty")
    return "inputs", data


class _Parts:
    """What `MultipartParser` reports, collected."""

    def __init__(self) -> None:
        self.found: list[tuple[bytes, bytes]] = []
        self.complete = False
        self._header, self._value, self._disposition = bytearray(), bytearray(), b""
        self._data: list[bytes] = []

    def callbacks(self) -> MultipartCallbacks:
        """For the parser."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_part_data": lambda data, start, end: self._data.append(data[start:end]),
            "on_part_end": lambda: self.found.append((self._disposition, b"".join(self._data))),
            "on_end": self._end,
        }

    def _begin(self) -> None:
        if len(self.found) == _MAX_FIELDS:
            raise RequestTooLarge(f"the form has too many fields; the most is {_MAX_FIELDS}")
        self._disposition, self._data = b"", []

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def _end(self) -> None:
        self.complete = True


def _as_object(fields: Sequence[tuple[str, str | bytes]], hint: str = "") -> dict[str, object]:
    inputs: list[str | bytes] = []
    document: dict[str, object] = {}
    for name, value in fields:
        if name not in MEMBERS:
            raise MalformedRequest(
                f"unknown form field {name[:60]!r}; a form has inputs and parameters{hint}"
            )
        if name == "inputs":
            inputs.append(value)
        elif name in document:
            raise MalformedRequest(f"the form has the field {name} twice")
        elif isinstance(value, str) and name == "parameters":
            document[name] = _parse_parameters(value)
        else:
            document[name] = value
    document["inputs"] = inputs if len(inputs) > 1 else inputs[0]
    return document


def _parse_parameters(text: str) -> object:
    try:
        return parse_json(text.encode())
    except MalformedRequest as error:
        raise MalformedRequest(f"in the field parameters: {error}") from None
