"""Bodies in and out: raw text and the Hugging Face shape.

`POST /` has two kinds of client, told apart by what they send:

    anything but a JSON object with "inputs"     the text goes to the pipeline, and its own output
                                                 comes back (the pipeline web-server guide, curl)
    {"inputs": ..., "parameters": {...}}         what `huggingface_hub.InferenceClient` and
                                                 huggingface.js send; the answer has their shape

A form with a field `inputs` is such an object (`curl -F`, `requests.post(data={"inputs": ...})`), and
several fields `inputs` are a list. `curl -d` says of every body that it is a form: one that does not begin
with `inputs=`, `parameters=` or `options=` is a text.

For a task that takes images or sound, the text is a file's bytes, and inputs are base64 (`media.py`).

A list of inputs is several items; the answer is a list in the same order.

Not here: which parameters exist (`tasks.py`), HTTP (`app.py`).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import parse_qsl

import orjson
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from serving_kit.errors import MalformedRequest, ModelFailed, RequestTooLarge, UnsupportedMediaType
from serving_kit.models.tasks import TASKS

_DEEPEST = 32
# Members that clients send beside inputs and parameters, and that change nothing here.
_IGNORED = frozenset({"options"})
_MEMBERS = frozenset({"inputs", "parameters"}) | _IGNORED
_URLENCODED_STARTS = tuple(f"{name}=".encode() for name in sorted(_MEMBERS))
_MOST_FIELDS = 1000  # of a form; their sizes are bounded by that of the body
_QUIET = logging.Logger(__name__, logging.CRITICAL)  # a bad form is reported to its client only
_TEXT_COMMANDS = 'send the text itself, curl -d "..." URL, or as a field, curl -F "inputs=..." URL'
_FILE_COMMANDS = "send the file itself, curl --data-binary @FILE URL, or in a form, curl -F inputs=@FILE URL"


@dataclass(frozen=True, slots=True)
class Call:
    """A request as the service wants it."""

    values: list[Any]
    parameters: dict[str, Any]
    many: bool = False  # the client sent a list and gets one
    widget: bool = False  # the client wants Hugging Face's shapes


def decode(body: bytes, content_type: str, task: str) -> Call:
    """Read a request body.

    Raises:
        MalformedRequest: what is wrong with it, and what would be right.
        UnsupportedMediaType: a form that this task does not take.
    """
    if not body:
        raise MalformedRequest('the body is empty; send a text, or {"inputs": ...} as JSON')
    kind = content_type.partition(";")[0].strip().lower()
    is_json = kind == "application/json" or kind.endswith("+json")
    media = task in TASKS and TASKS[task].media is not None
    if kind.startswith("multipart/"):
        return _widget_call(_read_multipart(body, content_type, media), task)
    if kind == "application/x-www-form-urlencoded" and (form := _read_urlencoded(body)):
        return _widget_call(form, task)
    if is_json:
        document = parse_json(body)
    elif media and not body.startswith(b"{"):  # no image or sound begins like that
        return Call([body], {})
    else:
        document = _decode_text(body)
        if document.lstrip().startswith("{"):  # curl -d '{"inputs": ...}' says it is a form
            document = _json_with_inputs(document, body) or document
    if isinstance(document, dict) and "inputs" in document:
        return _widget_call(document, task)
    if isinstance(document, str):
        if not document:
            raise MalformedRequest('the text is empty; send a text, or {"inputs": ...} as JSON')
        return Call([document], {})
    raise MalformedRequest('a JSON body must be an object with "inputs", or a string')


def parse_json(body: bytes) -> Any:
    """Strict JSON: UTF-8, no NaN, no duplicate members, no lone surrogates, at most 32 levels.

    Raises:
        MalformedRequest: naming the first thing that is wrong.
    """
    try:
        document = json.loads(
            _decode_text(body),
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_refuse_duplicates,
        )
    except json.JSONDecodeError as error:
        raise MalformedRequest(
            f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise MalformedRequest(f"the JSON is nested deeper than {_DEEPEST} levels") from None
    except ValueError:
        raise MalformedRequest("the JSON holds a number with too many digits") from None
    if body.count(b"[") + body.count(b"{") > _DEEPEST:
        _refuse_depth(document)
    if b"\\ud" in body.lower():
        try:
            json.dumps(document, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise MalformedRequest("the JSON holds half of a surrogate pair") from None
    return document


def encode(call: Call, answers: Sequence[Any], task: str) -> Iterator[bytes]:
    """The response body, one answer at a time: a caller can let others run between two.

    Raises:
        ModelFailed: the model's answer cannot be written as JSON.
    """
    # These clients expect a list of lists for one text, too, and take the first.
    wrapped = call.many or (call.widget and task == "text-classification")
    if wrapped:
        yield b"["
    for index, answer in enumerate(answers):
        if index:
            yield b","
        yield dump_json(_widget_answer(answer, task) if call.widget else answer)
    if wrapped:
        yield b"]"


def dump_json(document: Any) -> bytes:
    """Compact UTF-8 JSON; numpy and torch values become numbers and lists.

    Raises:
        ModelFailed: a value that JSON does not have.
    """
    # orjson takes a twentieth of the time, in which nobody else has the GIL. It writes NaN as null, and
    # refuses integers above 64 bits: where it may have, the slow and strict way decides.
    try:
        body = orjson.dumps(document, default=_plain, option=orjson.OPT_NON_STR_KEYS)
        if b"null" not in body:
            return body
    except TypeError:
        pass
    try:
        text = json.dumps(
            document, default=_plain, ensure_ascii=False, allow_nan=False, separators=(",", ":")
        )
        return text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ModelFailed(
            "the model's answer cannot be written as JSON", detail=f"{type(error).__name__}: {error}"
        ) from error


def _widget_call(document: Mapping[str, Any], task: str) -> Call:
    for name in document:
        if name not in ("inputs", "parameters") and name not in _IGNORED:
            raise MalformedRequest(f"unknown member {name[:60]!r}; the body has inputs and parameters")
    parameters = document.get("parameters")
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, dict):
        raise MalformedRequest(f"parameters must be an object, got {type(parameters).__name__}")
    if task == "token-classification":  # their shape has entity_group, which only grouping gives
        parameters = {"aggregation_strategy": "simple", **parameters}
    inputs = document["inputs"]
    many = isinstance(inputs, list)
    if inputs is None or inputs in ("", [], {}):
        raise MalformedRequest("inputs is empty")
    return Call(inputs if many else [inputs], parameters, many, widget=True)


def _read_urlencoded(body: bytes) -> dict[str, Any] | None:
    """The form as an object; None if the body is a text, of which `curl -d` has said that it is a form."""
    if not body.startswith(_URLENCODED_STARTS):
        return None
    if body.count(b"&") >= _MOST_FIELDS:
        raise RequestTooLarge(f"the form has too many fields; the most is {_MOST_FIELDS}")
    try:
        fields = parse_qsl(_decode_text(body), keep_blank_values=True, errors="strict")
    except UnicodeDecodeError:
        raise MalformedRequest("the form is not UTF-8 under its percent signs") from None
    if "inputs" not in dict(fields):
        return None
    return _form(fields, "; an & in a text is written %26 in a form: curl --data-urlencode 'inputs=...'")


def _read_multipart(body: bytes, content_type: str, media: bool) -> dict[str, Any]:
    """The form as an object. Where inputs are media, each file in it is an input, however it is named."""
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data":
        raise UnsupportedMediaType(f"this server takes no {kind.decode('latin-1')[:60]}")
    parts = _Parts()
    try:
        parser = MultipartParser(options.get(b"boundary", b""), parts.callbacks())
        parser.logger = _QUIET
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise MalformedRequest("the body is not the multipart form that its content type announces") from None
    if not parts.ended:
        raise MalformedRequest("the multipart form has no end")
    fields: list[tuple[str, str | bytes]] = []
    for disposition, data in parts.found:
        _, named = parse_options_header(disposition)
        name = _decode_text(named.get(b"name", b""))
        if b"filename" not in named:
            fields.append((name, _decode_text(data)))
        elif not media:
            raise UnsupportedMediaType(f"this task takes no files; {_TEXT_COMMANDS}")
        elif not data:
            raise MalformedRequest("inputs is empty")
        else:
            fields.append(("inputs", data))
    if "inputs" not in dict(fields):
        commands = _FILE_COMMANDS if media else _TEXT_COMMANDS
        raise UnsupportedMediaType(f"the form has no field inputs; {commands}")
    return _form(fields)


class _Parts:
    """What `MultipartParser` finds: of each part its `Content-Disposition` and its bytes."""

    def __init__(self) -> None:
        self.found: list[tuple[bytes, bytes]] = []
        self.ended = False
        self._header, self._value, self._disposition = bytearray(), bytearray(), b""
        self._data: list[bytes] = []

    def callbacks(self) -> Any:
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
        if len(self.found) == _MOST_FIELDS:
            raise RequestTooLarge(f"the form has too many fields; the most is {_MOST_FIELDS}")
        self._disposition, self._data = b"", []

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def _end(self) -> None:
        self.ended = True


def _form(fields: Sequence[tuple[str, str | bytes]], hint: str = "") -> dict[str, Any]:
    """A form's fields as the object that JSON clients send."""
    inputs: list[str | bytes] = []
    document: dict[str, Any] = {}
    for name, value in fields:
        if name not in _MEMBERS:
            raise MalformedRequest(
                f"unknown form field {name[:60]!r}; a form has inputs and parameters{hint}"
            )
        if name == "inputs":
            inputs.append(value)
        elif name in document:
            raise MalformedRequest(f"the form has the field {name} twice")
        elif isinstance(value, str) and name == "parameters":
            try:
                document[name] = parse_json(value.encode())
            except MalformedRequest as error:
                raise MalformedRequest(f"in the field parameters: {error}") from None
        else:
            document[name] = value
    document["inputs"] = inputs if len(inputs) > 1 else inputs[0]
    return document


def _widget_answer(answer: Any, task: str) -> Any:
    if task == "zero-shot-classification" and isinstance(answer, Mapping):
        pairs = zip(answer["labels"], answer["scores"], strict=True)
        return [{"label": label, "score": score} for label, score in pairs]
    return answer


def _decode_text(body: bytes) -> str:
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        raise MalformedRequest(f"the body is not UTF-8 (byte {error.start})") from None


def _json_with_inputs(text: str, body: bytes) -> dict[str, Any] | None:
    """The JSON object in a body that does not say it is JSON; None if it is just a text."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(document, dict) and "inputs" in document:
        strict = parse_json(body)
        assert isinstance(strict, dict)
        return strict
    return None


def _refuse_constant(name: str) -> NoReturn:
    raise MalformedRequest(f"JSON has no {name}")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise MalformedRequest("the JSON holds a number that is too large")
    return number


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise MalformedRequest("the JSON has an object with the same member twice")
    return members


def _refuse_depth(document: Any) -> None:
    level = [document]
    for _ in range(_DEEPEST + 1):
        below: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                below += each.values()
            elif isinstance(each, list):
                below += each
        if not below:
            return
        level = below
    raise MalformedRequest(f"the JSON is nested deeper than {_DEEPEST} levels")


def _plain(value: Any) -> Any:
    """What `json` cannot write by itself: numpy scalars and arrays, torch tensors."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")
