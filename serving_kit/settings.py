"""Every knob: default, range, unit, meaning, which part of the package reads it, and when a change counts.

A running server holds one `Settings`. Changing a knob replaces the whole object, so that no decision sees
half a change. Every knob here is live: it counts from the next step. What cannot change while a server runs
(model, host, port, name) is an option (`options.py`) and an argument of `serve()`.

Times are in milliseconds here, because that is how people tune them. Inside the package they are seconds on
a monotonic clock (`timeout_s`, `max_wait_s`).

How to add a knob: a field of `Settings`, a line in `Knobs`, and the row in the README. The rest follows from
them: `serve`, `tune`, `create_app`, the command, the environment, `/settings`, `/openapi.json` and the panel.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, TypeVar, Unpack

from serving_kit.errors import SettingError
from serving_kit.values import UNSET, Flag, Number, Schema, Spec, Whole

Auto = Literal["auto"]
F = TypeVar("F", bound=Callable[..., object])


class Knobs(TypedDict, total=False):
    """The knobs as keyword arguments: some of the fields of `Settings`, in their order."""

    max_batch_size: int
    max_wait_ms: float
    max_batch_tokens: int | Auto
    max_queue_size: int
    timeout_ms: float
    stream_timeout_ms: float
    group_by_length: bool
    drop_hopeless: bool
    overload_status: int
    expose_errors: bool
    max_body_bytes: int | Auto
    share_equal_inputs: bool
    max_cache_tokens: int | Auto
    inter_token_target_ms: float


def _knob(spec: Spec) -> Any:
    return dataclasses.field(default=spec.default, metadata={"spec": dataclasses.replace(spec, live=True)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The knobs of one server.

    Raises:
        SettingError: a value is outside its range.
    """

    max_batch_size: int = _knob(
        Whole(1, 4096, default=32, unit="items", owner="scheduling", doc="most items in one step")
    )
    max_wait_ms: float = _knob(
        Number(
            0,
            60_000,
            default=0.0,
            unit="ms",
            owner="scheduling",
            doc="longest that the oldest item waits for others while the model is idle; "
            "counted from its arrival, never restarted",
        )
    )
    max_batch_tokens: int | Auto = _knob(
        Whole(
            1,
            100_000_000,
            default="auto",
            unit="tokens",
            auto=True,
            owner="scheduling",
            doc="tokens that the model computes in one step (items x longest if it pads); auto: learned "
            "from the deadline and the cost model",
        )
    )
    max_queue_size: int = _knob(
        Whole(
            1,
            100_000,
            default=256,
            unit="items",
            owner="scheduling",
            doc="items that may wait; the next one is refused at once",
        )
    )
    timeout_ms: float = _knob(
        Number(
            1,
            3_600_000,
            default=10_000.0,
            unit="ms",
            owner="engine",
            doc="arrival to answer; a client may ask for less (X-Request-Timeout-Ms), never for more",
        )
    )
    stream_timeout_ms: float = _knob(
        Number(
            1,
            86_400_000,
            default=300_000.0,
            unit="ms",
            owner="engine",
            doc="arrival to the end of a stream, whose first chunk is bounded by timeout_ms",
        )
    )
    group_by_length: bool = _knob(
        Flag(
            default=True,
            owner="scheduling",
            doc="batch like lengths together, always with the oldest item; without effect where the model "
            "packs, because no length costs another one anything there",
        )
    )
    drop_hopeless: bool = _knob(
        Flag(default=True, owner="scheduling", doc="refuse early what cannot be answered in time")
    )
    overload_status: int = _knob(
        Whole(
            choices=(503, 429),
            default=503,
            owner="http",
            doc="status of a refusal: 503, or 429 for clients that retry 503 without pause",
        )
    )
    expose_errors: bool = _knob(
        Flag(
            default=False,
            owner="http",
            doc="show clients the exception text instead of only an incident id",
        )
    )
    max_body_bytes: int | Auto = _knob(
        Whole(
            1,
            2**31,
            default="auto",
            unit="bytes",
            auto=True,
            owner="http",
            doc="longest request body; auto: 1 MiB for text, 32 MiB for media",
        )
    )
    share_equal_inputs: bool = _knob(
        Flag(
            default=False,
            owner="engine",
            doc="equal inputs in flight share one computation; cancelling one request never cancels it for "
            "another",
        )
    )
    max_cache_tokens: int | Auto = _knob(
        Whole(
            1,
            2**31,
            default="auto",
            unit="tokens",
            auto=True,
            owner="scheduling",
            doc="continuous batching: tokens in the caches of all texts that are being generated; auto: what "
            "a quarter of the free memory holds",
        )
    )
    inter_token_target_ms: float = _knob(
        Number(
            1,
            60_000,
            default=100.0,
            unit="ms",
            owner="scheduling",
            doc="continuous batching: prompts are computed in chunks, so that the time between two tokens of "
            "a text stays within this",
        )
    )

    def __post_init__(self) -> None:
        for name, spec in KNOBS.items():
            object.__setattr__(self, name, spec.check(name, getattr(self, name)))

    @property
    def max_wait_s(self) -> float:
        """`max_wait_ms` in seconds."""
        return self.max_wait_ms / 1000

    @property
    def timeout_s(self) -> float:
        """`timeout_ms` in seconds."""
        return self.timeout_ms / 1000

    @property
    def stream_timeout_s(self) -> float:
        """`stream_timeout_ms` in seconds."""
        return self.stream_timeout_ms / 1000

    @property
    def inter_token_target_s(self) -> float:
        """`inter_token_target_ms` in seconds."""
        return self.inter_token_target_ms / 1000

    def replace(self, /, **changes: Unpack[Knobs]) -> Settings:
        """A copy with some knobs changed; `self` stays as it is.

        Raises:
            SettingError: an unknown knob (the text suggests the nearest name), or a bad value.
        """
        refuse_unknown(changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, object]:
        """A flat JSON object, knob: value. `Settings(**d)` reads it back."""
        return dataclasses.asdict(self)


KNOBS: Mapping[str, Spec] = {f.name: f.metadata["spec"] for f in dataclasses.fields(Settings)}


def settings_schema() -> dict[str, Schema]:
    """The JSON schema of each knob."""
    return {name: spec.schema() for name, spec in KNOBS.items()}


def refuse_unknown(names: Iterable[object], others: Iterable[str] = ()) -> None:
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


def with_knobs(*, defaults: bool) -> Callable[[F], F]:
    """Show the knobs as keyword arguments in the signature of a function that takes `**knobs: Unpack[Knobs]`.

    Type checkers read `Knobs`. Jupyter's Tab and Shift+Tab, and `help()`, read the signature. The function
    still gets only the knobs that were given, and unknown names too.

    Args:
        defaults: Whether a knob that is not given has its default. False: it stays as it is, shown as `...`.
    """
    types = typing.get_type_hints(Knobs)
    knobs = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=spec.default if defaults else UNSET,
            annotation=types[name],
        )
        for name, spec in KNOBS.items()
    ]

    def decorate(function: F) -> F:
        signature = inspect.signature(function, eval_str=True)
        named = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        shown = signature.replace(parameters=[*named, *knobs])
        function.__signature__ = shown  # type: ignore[attr-defined]
        return function

    return decorate
