"""The options of the command and of `create_app`, and what the environment and a file say about them.

    command line, or arguments in code    before
    environment: SERVING_KIT_<NAME>       before
    file: NAME = VALUE, as TOML           before
    default

The file is named by `--settings` or `SERVING_KIT_SETTINGS`. Every message names the variable or the file that
it is about. An unknown name is an error in the file. In the environment it is a warning, because other
programs set variables too.

Not here: the knobs themselves (`settings.py`), what is made of the options (`spec.py`), the command line
(`cli.py`).
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

from serving_kit.errors import SettingError, StartError
from serving_kit.log import FORMATS, LEVELS
from serving_kit.settings import KNOBS
from serving_kit.values import Flag, Number, Spec, Text, Texts, Whole

PREFIX = "SERVING_KIT_"
SETTINGS_VARIABLE = f"{PREFIX}SETTINGS"
TOKEN_VARIABLE = f"{PREFIX}TOKEN"
_OTHERS = (SETTINGS_VARIABLE, TOKEN_VARIABLE, f"{PREFIX}URL")
DRAIN_S = 25.0  # Kubernetes waits 30 s by default between SIGTERM and SIGKILL

# What Kubernetes sets in every pod beside a Service of the name serving-kit:
# SERVING_KIT_SERVICE_HOST=10.0.0.1, SERVING_KIT_PORT=tcp://10.0.0.1:80 and more.
_SERVICE_LINK = re.compile(PREFIX + r"(.*_)?(SERVICE_(HOST|PORT).*|PORT(_\d+_(TCP|UDP|SCTP).*)?)")
_SERVICE_PORT = re.compile(r"(tcp|udp|sctp)://")

OPTIONS: Mapping[str, Spec] = {
    "model": Text(doc="Hub id or folder; default: the demo model"),
    "task": Text(doc="task of transformers.pipeline; default: what the model is for"),
    "device": Text(doc="cpu, cuda:0, mps...; default: the first accelerator, else cpu"),
    "host": Text(doc="address to listen on (default: 127.0.0.1)", default="127.0.0.1"),
    "port": Whole(0, 65535, doc="port; 0 takes any free one (default: 8000)", default=8000),
    "allowed_hosts": Texts(
        doc=f"a name that it may be asked by (as a variable: {PREFIX}ALLOWED_HOSTS)", default=()
    ),
    "allowed_origins": Texts(
        doc=f"a site whose pages may ask, CORS (as a variable: {PREFIX}ALLOWED_ORIGINS)", default=()
    ),
    "drain_s": Number(
        0,
        86_400,
        unit="s",
        default=DRAIN_S,
        doc="longest that admitted requests may take to finish after the stop was asked for; the rest is "
        f"answered with 503 (default: {DRAIN_S:g})",
    ),
    "lame_duck_s": Number(
        0,
        86_400,
        unit="s",
        default=0.0,
        doc="time between SIGTERM and the drain in which /health says 503 and requests are still answered "
        "(default: 0)",
    ),
    "threads": Whole(
        1,
        1024,
        unit="threads",
        doc="torch's threads for one operation (default: the CPUs that affinity and cgroup quota allow, at "
        "most as many as torch itself would take)",
    ),
    "precision": Text(
        doc="fast: bfloat16, if it is measured to be faster here (default: exact)",
        choices=("exact", "fast"),
        default="exact",
    ),
    "live_timeout_s": Number(
        0.001,
        86_400,
        unit="s",
        doc="seconds after which a model call that hangs makes GET /live answer 503 (default: never)",
    ),
    "require_token": Flag(doc="every request needs the token, also from this machine", default=False),
    "log_level": Text(doc="least level of the log on stderr (default: info)", choices=LEVELS, default="info"),
    "log_format": Text(doc="json: one object per line (default: text)", choices=FORMATS, default="text"),
    "access_log": Flag(doc="one line per HTTP request as well", default=False),
    **KNOBS,
}


def check_host(host: object) -> None:
    """Raise `StartError` unless `host` is a name or an address."""
    if not isinstance(host, str) or not host:
        raise StartError(
            f'host must be a name or an address, got {host!r}: "127.0.0.1" for this machine only, "0.0.0.0" '
            "for every network that it is on"
        )


def check_port(port: object) -> None:
    """Raise `StartError` unless `port` is a port."""
    if type(port) is not int or not 0 <= port <= 65535:  # True is no port
        raise StartError(f"port must be a whole number from 0 to 65535, got {port!r}")


def from_outside(
    environment: Mapping[str, str], path: str | os.PathLike[str] | None = None
) -> dict[str, object]:
    """Every option that the environment or a file gives, checked; the environment comes first.

    Args:
        environment: Such as `os.environ`. Empty variables count as not set.
        path: The file; None takes it from `SERVING_KIT_SETTINGS`, if that is set.

    Raises:
        SettingError: a bad value, or a file that cannot be read; the text names the source.
    """
    path = path or environment.get(SETTINGS_VARIABLE)
    return {**(from_file(path) if path else {}), **from_environment(environment)}


def from_environment(environment: Mapping[str, str]) -> dict[str, object]:
    """The options that are given as `SERVING_KIT_<NAME>`.

    Raises:
        SettingError: a bad value; the text names the variable.
    """
    values = {}
    for name, spec in OPTIONS.items():
        variable = PREFIX + name.upper()
        text = environment.get(variable, "")
        if not text or (name == "port" and _SERVICE_PORT.match(text)):
            continue
        try:
            values[name] = spec.read(name, text)
        except SettingError as error:
            raise SettingError(f"{variable}: {error}") from None
    return values


def from_file(path: str | os.PathLike[str]) -> dict[str, object]:
    """The options in a TOML file: a flat table, name = value.

    Raises:
        SettingError: it cannot be read, or has an unknown name or a bad value; the text names the file.
    """
    values = {}
    for name, value in _read_toml(path).items():
        if name not in OPTIONS:
            raise SettingError(f"{path}: there is no option named {name!r}{_near(name, OPTIONS)}")
        try:
            values[name] = OPTIONS[name].check(name, value)
        except SettingError as error:
            raise SettingError(f"{path}: {error}") from None
    return values


def _read_toml(path: str | os.PathLike[str]) -> dict[str, object]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingError(f"{path}: it cannot be read: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingError(f"{path}: it is no TOML: {error}") from None


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """A warning for each variable that looks like an option and is none."""
    known = [*(PREFIX + name.upper() for name in OPTIONS), *_OTHERS]
    return [
        f"the environment variable {name} is not known and has no effect{_near(name, known)}"
        for name in environment
        if name.startswith(PREFIX) and name not in known and not _SERVICE_LINK.fullmatch(name)
    ]


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
