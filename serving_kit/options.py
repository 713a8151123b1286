"""The options of the command and of `create_app`, and what the environment and a file say about them.

    command line, or arguments in code    before
    environment: SERVING_KIT_<NAME>       before
    file: NAME = VALUE, as TOML           before
    default

The file is named by `--settings` or `SERVING_KIT_SETTINGS`. Every complaint names the variable or the
file that it is about. A name that is unknown is an error in the file; in the environment, which other
programs fill too, it is a warning.

Not here: the knobs themselves (`settings.py`), the command line (`cli.py`).
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving_kit.errors import SettingError
from serving_kit.log import FORMATS, LEVELS
from serving_kit.settings import KNOBS, Knob

PREFIX = "SERVING_KIT_"
SETTINGS_VARIABLE = f"{PREFIX}SETTINGS"
TOKEN_VARIABLE = f"{PREFIX}TOKEN"
_OTHERS = (SETTINGS_VARIABLE, TOKEN_VARIABLE, f"{PREFIX}URL")
DRAIN_S = 25.0  # Kubernetes waits 30 s by default between SIGTERM and SIGKILL

# What Kubernetes sets in every pod beside a Service of the name serving-kit:
# SERVING_KIT_SERVICE_HOST=10.0.0.1, SERVING_KIT_PORT=tcp://10.0.0.1:80 and more.
_SERVICE_LINK = re.compile(PREFIX + r"(.*_)?(SERVICE_(HOST|PORT).*|PORT(_\d+_(TCP|UDP|SCTP).*)?)")
_NUMBER = re.compile(r"[+-]?[0-9]{1,15}(\.[0-9]{1,15})?([eE][+-]?[0-9]{1,2})?")
_SERVICE_PORT = re.compile(r"(tcp|udp|sctp)://")


@dataclass(frozen=True, slots=True)
class Option:
    """One option: what it means, and what its values are."""

    doc: str
    knob: Knob | None = None  # a number or a yes/no; None: text
    many: bool = False  # several texts: separated by commas in a variable, a list in a file
    choices: tuple[str, ...] = ()  # the texts that it takes; empty: any

    def read(self, name: str, text: str) -> Any:
        """The value that a text from a command line or a variable stands for.

        Raises:
            SettingError: naming the option, the text and the range.
        """
        if self.many:
            return [each.strip() for each in text.split(",") if each.strip()]
        value: object = text
        if self.knob is not None and self.knob.kind is bool:
            value = {"yes": True, "true": True, "no": False, "false": False}.get(text.lower(), text)
        elif self.knob is not None and _NUMBER.fullmatch(text):
            value = float(text) if set(text) & set(".eE") else int(text)
        return self.check(name, value)

    def check(self, name: str, value: Any) -> Any:
        """A value as it may come from a file.

        Raises:
            SettingError: naming the option, the value and the range.
        """
        if self.knob is not None:
            return self.knob.check(name, value)
        if self.many:
            if isinstance(value, list) and all(isinstance(each, str) for each in value):
                return value
            raise SettingError(f"{name} must be a list of texts, got {value!r}")
        if isinstance(value, str) and (not self.choices or value in self.choices):
            return value
        kind = f"one of {', '.join(self.choices)}" if self.choices else "a text"
        raise SettingError(f"{name} must be {kind}, got {value!r}")


OPTIONS: Mapping[str, Option] = {
    "model": Option("Hub id or folder; default: the demo model"),
    "task": Option("task of transformers.pipeline; default: what the model is for"),
    "device": Option("cpu, cuda:0, mps...; default: the first accelerator, else cpu"),
    "host": Option("address to listen on (default: 127.0.0.1)"),
    "port": Option("port; 0 takes any free one (default: 8000)", Knob("", int, 0, 65535)),
    "allowed_hosts": Option(
        f"a name that it may be asked by (as a variable: {PREFIX}ALLOWED_HOSTS)", many=True
    ),
    "allowed_origins": Option(
        f"a site whose pages may ask, CORS (as a variable: {PREFIX}ALLOWED_ORIGINS)", many=True
    ),
    "drain_s": Option(
        "longest that admitted requests may take to finish after the stop was asked for; the rest is "
        f"answered with 503 (default: {DRAIN_S:g})",
        Knob("", float, 0, 86_400, unit="s"),
    ),
    "lame_duck_s": Option(
        "time between SIGTERM and the drain in which /health says 503 and requests are still answered "
        "(default: 0)",
        Knob("", float, 0, 86_400, unit="s"),
    ),
    "threads": Option(
        "torch's threads for one operation (default: the CPUs that affinity and cgroup quota allow, at "
        "most as many as torch itself would take)",
        Knob("", int, 1, 1024, unit="threads"),
    ),
    "live_timeout_s": Option(
        "seconds after which a forward that hangs makes GET /live answer 503 (default: never)",
        Knob("", float, 0.001, 86_400, unit="s"),
    ),
    "require_token": Option("every request needs the token, also from this machine", Knob("", bool)),
    "log_level": Option("least level of the log on stderr (default: info)", choices=LEVELS),
    "log_format": Option("json: one object per line (default: text)", choices=FORMATS),
    "access_log": Option("one line per HTTP request as well", Knob("", bool)),
    **{name: Option(knob.doc, knob) for name, knob in KNOBS.items()},
}


def from_outside(
    environment: Mapping[str, str], path: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Every option that the environment or a file gives, checked; the environment comes first.

    Args:
        environment: Such as `os.environ`. Empty variables count as not set.
        path: The file; None takes it from `SERVING_KIT_SETTINGS`, if that is set.

    Raises:
        SettingError: a bad value, or a file that cannot be read; the text names the source.
    """
    path = path or environment.get(SETTINGS_VARIABLE)
    return {**(from_file(path) if path else {}), **from_environment(environment)}


def from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """The options that are given as `SERVING_KIT_<NAME>`.

    Raises:
        SettingError: a bad value; the text names the variable.
    """
    values = {}
    for name, option in OPTIONS.items():
        variable = PREFIX + name.upper()
        text = environment.get(variable, "")
        if not text or (name == "port" and _SERVICE_PORT.match(text)):
            continue
        try:
            values[name] = option.read(name, text)
        except SettingError as error:
            raise SettingError(f"{variable}: {error}") from None
    return values


def from_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The options in a TOML file: a flat table, name = value.

    Raises:
        SettingError: it cannot be read, or has an unknown name or a bad value; the text names the file.
    """
    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingError(f"{path}: it cannot be read: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingError(f"{path}: it is no TOML: {error}") from None
    values = {}
    for name, value in document.items():
        if name not in OPTIONS:
            raise SettingError(f"{path}: there is no option named {name!r}{_near(name, OPTIONS)}")
        try:
            values[name] = OPTIONS[name].check(name, value)
        except SettingError as error:
            raise SettingError(f"{path}: {error}") from None
    return values


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """A warning for each variable that looks like an option and is none."""
    known = [*(PREFIX + name.upper() for name in OPTIONS), *_OTHERS]
    return [
        f"the environment variable {name} is not known and has no effect{_near(name, known)}"
        for name in environment
        if name.startswith(PREFIX) and name not in known and not _SERVICE_LINK.fullmatch(name)
    ]


def _near(name: str, known: Mapping[str, Any] | list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""
