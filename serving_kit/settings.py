"""Every knob: unit, default, range, meaning. Frozen; changed by replacement.

A running server holds one `Settings`; changing a knob swaps the whole object, so that a decision
never sees half a change. Every knob here is live: it takes effect from the next decision. What
cannot change while a server runs (model, host, port, name) is an argument of `serve()` instead.

Times are in milliseconds here, because that is how people tune them; inside, everything is in
seconds (`timeout_s`, `max_wait_s`).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from serving_kit.errors import SettingError

Auto = Literal["auto"]
_JSON_TYPES: Mapping[type, str] = {int: "integer", float: "number", bool: "boolean"}


@dataclass(frozen=True, slots=True)
class Knob:
    """What a person needs to know about one setting, and how to check a value for it."""

    doc: str
    kind: type  # int, float or bool
    low: float | None = None
    high: float | None = None
    unit: str = ""
    auto: bool = False  # may also be the word "auto"
    choices: tuple[int, ...] = ()

    @property
    def range(self) -> str:
        """The values that this knob takes, in words."""
        if self.kind is bool:
            return "true or false"
        if self.choices:
            return " or ".join(map(str, self.choices))
        noun = "a whole number" if self.kind is int else "a number"
        unit = f" {self.unit}" if self.unit else ""
        words = f"{noun} from {self.low:,.12g} to {self.high:,.12g}{unit}"
        return f'{words}, or "auto"' if self.auto else words

    def check(self, name: str, value: Any) -> Any:
        """Return `value` in this knob's own type.

        Raises:
            SettingError: naming the knob, the value and the range.
        """
        value = as_python(value)
        if self.auto and isinstance(value, str) and value == "auto":
            return value
        if self.kind is bool:
            if isinstance(value, bool):
                return value
        elif not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value):
            whole = self.kind is not int or value == int(value)
            fits = value in self.choices if self.choices else (self.low or 0) <= value <= (self.high or 0)
            if whole and fits:
                return self.kind(value)
        raise SettingError(f"{name} must be {self.range}, got {value!r}")


def _knob(default: Any, doc: str, kind: type, *bounds: float, **more: Any) -> Any:
    low, high = bounds or (None, None)
    return dataclasses.field(default=default, metadata={"knob": Knob(doc, kind, low, high, **more)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The knobs of one server.

    Raises:
        SettingError: a value is outside its range; nothing is changed.
    """

    max_batch_size: int = _knob(32, "most items in one forward", int, 1, 4096, unit="items")
    max_wait_ms: float = _knob(
        0.0,
        "longest that the oldest item waits for company while the model is idle; "
        "counted from its arrival, never restarted",
        float,
        0,
        60_000,
        unit="ms",
    )
    max_batch_tokens: int | Auto = _knob(
        "auto",
        "padded tokens (items x longest) in one forward; auto: learned from the deadline and the cost model",
        int,
        1,
        100_000_000,
        unit="tokens",
        auto=True,
    )
    max_queue_size: int = _knob(
        256, "items that may wait; the next one is refused at once", int, 1, 100_000, unit="items"
    )
    timeout_ms: float = _knob(
        10_000.0,
        "arrival to answer; a client may ask for less (X-Request-Timeout-Ms), never for more",
        float,
        1,
        3_600_000,
        unit="ms",
    )
    group_by_length: bool = _knob(True, "batch like lengths together, always with the oldest item", bool)
    drop_hopeless: bool = _knob(True, "refuse early what cannot be answered in time", bool)
    overload_status: int = _knob(
        503,
        "status of a refusal: 503, or 429 for clients that retry 503 without pause",
        int,
        choices=(503, 429),
    )
    expose_errors: bool = _knob(False, "show clients the exception text instead of only an incident id", bool)
    max_body_bytes: int | Auto = _knob(
        "auto",
        "longest request body; auto: 1 MiB for text, 32 MiB for media",
        int,
        1,
        2**31,
        unit="bytes",
        auto=True,
    )

    def __post_init__(self) -> None:
        for name, knob in KNOBS.items():
            object.__setattr__(self, name, knob.check(name, getattr(self, name)))

    @property
    def max_wait_s(self) -> float:
        """`max_wait_ms` in seconds."""
        return self.max_wait_ms / 1000

    @property
    def timeout_s(self) -> float:
        """`timeout_ms` in seconds."""
        return self.timeout_ms / 1000

    def replace(self, /, **changes: Any) -> Settings:
        """A copy with some knobs changed; `self` stays as it is.

        Raises:
            SettingError: an unknown knob (the text suggests the nearest name), or a bad value.
        """
        refuse_unknown(changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """A flat JSON object, knob: value. `Settings(**d)` reads it back."""
        return dataclasses.asdict(self)


KNOBS: Mapping[str, Knob] = {f.name: f.metadata["knob"] for f in dataclasses.fields(Settings)}


def settings_schema() -> dict[str, object]:
    """A JSON schema for each knob, with its meaning and its unit."""
    return {name: _knob_schema(name, knob) for name, knob in KNOBS.items()}


def _knob_schema(name: str, knob: Knob) -> dict[str, object]:
    schema: dict[str, object] = {"type": _JSON_TYPES[knob.kind]}
    if knob.choices:
        schema["enum"] = list(knob.choices)
    elif knob.low is not None and knob.high is not None:
        schema |= {"minimum": knob.low, "maximum": knob.high}
    if knob.auto:
        schema = {"oneOf": [schema, {"const": "auto"}]}
    unit = {"x-unit": knob.unit} if knob.unit else {}
    return {**schema, "description": knob.doc, "default": getattr(Settings(), name), **unit}


def as_python(value: Any) -> Any:
    """A numpy number as Python's own; anything else as it is."""
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return value.item()
    return value


def refuse_unknown(names: Mapping[str, Any], others: Iterable[str] = ()) -> None:
    """Raise `SettingError` for the first name that is not a knob, with the nearest one that is.

    Args:
        names: What was given.
        others: More names that could be meant.
    """
    for name in names:
        if name not in KNOBS:
            near = difflib.get_close_matches(str(name), [*KNOBS, *others], n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; the knobs are {', '.join(KNOBS)}"
            raise SettingError(f"there is no setting named {str(name)[:60]!r}{hint}")
