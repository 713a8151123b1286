"""Which values a knob, an option or a pipeline parameter takes: checks, words and JSON schemas.

One `Spec` describes one name. The classes below are the kinds of values:

    Whole, Number, Flag      numbers, true or false
    Text, Template           strings
    Texts                    lists of strings
    Members                  objects

Pure. Not here: the knobs (`settings.py`), the options (`options.py`), the parameters (`models/tasks.py`).
"""

from __future__ import annotations

import re
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar, Final, Literal

from serving_kit.errors import SettingError

Owner = Literal["", "http", "engine", "scheduling"]
Schema = dict[str, object]  # a JSON schema


class _Unset:
    """Stands for a value that was not given; Shift+Tab shows it as `...`."""

    def __repr__(self) -> str:
        return "..."

    def __reduce__(self) -> str:
        return "UNSET"  # the same object after pickling


UNSET: Final = _Unset()
_NUMBER = re.compile(r"[+-]?[0-9]{1,15}(\.[0-9]{1,15})?([eE][+-]?[0-9]{1,2})?")
_LONGEST_REPR = 60
_LONGEST_ENTRY = 1000  # characters of one string in a list


@dataclass(frozen=True, slots=True)
class Spec(ABC):
    """The values that one name takes, and what they mean.

    Attributes:
        low: Least value; for a list the fewest entries.
        high: Greatest value; for a list the most entries.
        doc: What it means, in a few words.
        default: Its default; `UNSET` if there is none.
        unit: Such as "ms".
        choices: The only values that it takes; empty: any in the range.
        auto: Whether it also takes the word "auto".
        null: Whether it also takes None.
        owner: The part of the package that reads it; empty for a pipeline parameter.
        live: Whether a change counts from the next step. False: it needs a new server.
    """

    kind: ClassVar[type]
    json_type: ClassVar[str]

    low: float | None = None
    high: float | None = None
    _: KW_ONLY
    doc: str = ""
    default: object = UNSET
    unit: str = ""
    choices: tuple[int | str, ...] = ()
    auto: bool = False
    null: bool = False
    owner: Owner = ""
    live: bool = False

    @property
    def range(self) -> str:
        """The values that it takes, in words."""
        words = f'{self._words()}, or "auto"' if self.auto else self._words()
        return f"null or {words}" if self.null else words

    def problem(self, value: object) -> str:
        """What the value must be instead; empty if it fits."""
        return "" if self._is_word(value) else self._problem(as_python(value))

    def typed(self, value: object) -> object:
        """A value that fits, in the type of this spec: JSON's 1 is a Number's 1.0."""
        return value if self._is_word(value) else self._typed(as_python(value))

    def check(self, name: str, value: object) -> object:
        """Return `value` in the type of this spec.

        Raises:
            SettingError: naming `name`, the range and the value.
        """
        if problem := self.problem(value):
            raise SettingError(f"{name} must be {problem}, got {shown(as_python(value))}")
        return self.typed(value)

    def read(self, name: str, text: str) -> object:
        """The value that a text of a command line or an environment variable stands for.

        Raises:
            SettingError: as `check` does.
        """
        return self.check(name, self._parsed(text))

    def schema(self) -> Schema:
        """The JSON schema of the values."""
        schema = self._schema()
        others: list[Schema] = [{"const": "auto"}] if self.auto else []
        others += [{"type": "null"}] if self.null else []
        if others:
            schema = {"oneOf": [schema, *others]}
        about = {"description": self.doc, "x-unit": self.unit, "x-owner": self.owner}
        schema |= {name: text for name, text in about.items() if text}
        if self.owner:
            schema["x-live"] = self.live
        return schema if self.default is UNSET else {**schema, "default": self.default}

    def _is_word(self, value: object) -> bool:
        return (value is None and self.null) or (self.auto and isinstance(value, str) and value == "auto")

    def _problem(self, value: object) -> str:
        return "" if self._fits(value) else self.range

    def _fits(self, value: object) -> bool:
        return isinstance(value, self.kind)

    def _typed(self, value: object) -> object:
        return value

    def _parsed(self, text: str) -> object:
        return text

    def _schema(self) -> Schema:
        return {"type": self.json_type}

    @abstractmethod
    def _words(self) -> str:
        """The values in words, without "auto" and null."""


@dataclass(frozen=True, slots=True)
class Number(Spec):
    """A number in a closed range."""

    kind: ClassVar[type] = float
    json_type: ClassVar[str] = "number"

    def _fits(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        if self.choices:
            return value in self.choices
        return (self.low is None or self.low <= value) and (self.high is None or value <= self.high)

    def _typed(self, value: object) -> object:
        return self.kind(value)

    def _parsed(self, text: str) -> object:
        if not _NUMBER.fullmatch(text):
            return text
        return float(text) if set(text) & set(".eE") else int(text)

    def _schema(self) -> Schema:
        if self.choices:
            return {"type": self.json_type, "enum": list(self.choices)}
        bounds = {"minimum": self.low, "maximum": self.high}
        return {"type": self.json_type, **{key: bound for key, bound in bounds.items() if bound is not None}}

    def _noun(self) -> str:
        return "a number"

    def _words(self) -> str:
        if self.choices:
            return " or ".join(map(str, self.choices))
        # Quantities have a unit, and their digits are grouped. Those of a port are not.
        style, unit = (",.12g", f" {self.unit}") if self.unit else (".12g", "")
        return f"{self._noun()} from {self.low or 0:{style}} to {self.high or 0:{style}}{unit}"


@dataclass(frozen=True, slots=True)
class Whole(Number):
    """A whole number in a closed range, or one of `choices`."""

    kind: ClassVar[type] = int
    json_type: ClassVar[str] = "integer"

    def _fits(self, value: object) -> bool:
        return Number._fits(self, value) and value == int(value)  # type: ignore[call-overload]

    def _noun(self) -> str:
        return "a whole number"


@dataclass(frozen=True, slots=True)
class Flag(Spec):
    """Either true or false."""

    kind: ClassVar[type] = bool
    json_type: ClassVar[str] = "boolean"

    def _parsed(self, text: str) -> object:
        return {"yes": True, "true": True, "no": False, "false": False}.get(text.lower(), text)

    def _words(self) -> str:
        return "true or false"


@dataclass(frozen=True, slots=True)
class Text(Spec):
    """A string, or one of `choices`."""

    kind: ClassVar[type] = str
    json_type: ClassVar[str] = "string"

    def _fits(self, value: object) -> bool:
        return isinstance(value, str) and (not self.choices or value in self.choices)

    def _schema(self) -> Schema:
        return {"type": "string", "enum": list(self.choices)} if self.choices else {"type": "string"}

    def _words(self) -> str:
        return f"one of {', '.join(map(str, self.choices))}" if self.choices else "a text"


@dataclass(frozen=True, slots=True)
class Template(Spec):
    """A string with exactly one `{}` and no other braces: the hypothesis of zero-shot classification."""

    kind: ClassVar[type] = str
    json_type: ClassVar[str] = "string"

    def _fits(self, value: object) -> bool:
        if not isinstance(value, str) or len(value) > _LONGEST_ENTRY or value.count("{}") != 1:
            return False
        return "{" not in value.replace("{}", "")

    def _schema(self) -> Schema:
        return {"type": "string", "maxLength": _LONGEST_ENTRY, "pattern": r"^[^{]*\{\}[^{]*$"}

    def _words(self) -> str:
        return "a string with exactly one {} in it"


@dataclass(frozen=True, slots=True)
class Texts(Spec):
    """A list of strings. Where `high` is given: of so many, none of them empty.

    Attributes:
        or_one: Whether it also takes one string.
        commas: Whether one string stands for several, which the pipeline cuts at its commas.
    """

    kind: ClassVar[type] = list
    json_type: ClassVar[str] = "array"

    or_one: bool = False
    commas: bool = False

    def _fits(self, value: object) -> bool:
        if isinstance(value, str) and (self.or_one or self.commas):
            value = [each for each in value.split(",") if each.strip()] if self.commas else [value]
        if not isinstance(value, list):
            return False
        if self.high is None:
            return all(isinstance(each, str) for each in value)
        few_enough = 0 < len(value) <= self.high
        return few_enough and all(isinstance(each, str) and 0 < len(each) <= _LONGEST_ENTRY for each in value)

    def _parsed(self, text: str) -> object:
        return [each.strip() for each in text.split(",") if each.strip()]

    def _schema(self) -> Schema:
        if self.high is None:
            return {"type": "array", "items": {"type": "string"}}
        entry = {"type": "string", "minLength": 1, "maxLength": _LONGEST_ENTRY}
        entries: Schema = {"type": "array", "items": entry, "minItems": 1, "maxItems": int(self.high)}
        if self.commas:
            several = f"Cut at its commas: 1 to {self.high:g} strings of 1 to {_LONGEST_ENTRY} characters."
            return {"oneOf": [entries, {"type": "string", "pattern": r"[^,\s]", "description": several}]}
        return {"oneOf": [entries, entry]} if self.or_one else entries

    def _words(self) -> str:
        if self.high is None:
            return "a list of texts"
        return f"a list of 1 to {self.high:g} strings of 1 to {_LONGEST_ENTRY} characters"


@dataclass(frozen=True, slots=True)
class Members(Spec):
    """A JSON object with some of these members."""

    kind: ClassVar[type] = dict
    json_type: ClassVar[str] = "object"

    members: Mapping[str, Spec] = field(default_factory=dict)

    def _problem(self, value: object) -> str:
        if not isinstance(value, dict) or not value.keys() <= self.members.keys():
            return self.range
        for name, each in value.items():
            if problem := self.members[name].problem(each):
                return f"{self.range}, where {name} is {problem}"
        return ""

    def _typed(self, value: object) -> object:
        given = value.items() if isinstance(value, dict) else ()
        return {name: self.members[name].typed(each) for name, each in given}

    def _schema(self) -> Schema:
        return object_schema(self.members)

    def _words(self) -> str:
        return f"an object with some of {', '.join(self.members)}"


def object_schema(members: Mapping[str, Spec], required: tuple[str, ...] = ()) -> Schema:
    """The JSON schema of an object whose members these specs describe, and no others."""
    schema: Schema = {
        "type": "object",
        "additionalProperties": False,
        "properties": {name: spec.schema() for name, spec in members.items()},
    }
    return {**schema, "required": list(required)} if required else schema


def as_python(value: object) -> object:
    """A numpy number as Python's own; anything else as it is."""
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        item: object = value.item()  # type: ignore[attr-defined]
        return item
    return value


def shown(value: object) -> str:
    """A value as it stands in a message: its repr, shortened. Takes no time for a long value."""
    text = reprlib.repr(value)
    return text if len(text) <= _LONGEST_REPR else f"{text[: _LONGEST_REPR - 3]}..."
