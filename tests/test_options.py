"""Options from the command line, the environment and a file: their order, and the messages about bad ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import serving_kit
from serving_kit import SettingError
from serving_kit.cli import main
from serving_kit.options import OPTIONS
from serving_kit.settings import KNOBS
from tests.support import run_script

pytestmark = pytest.mark.light

# Prints the settings of an app that reads its options.
ASK = """
import json, sys
from starlette.testclient import TestClient
import serving_kit

def echo(texts):
    return texts

app = serving_kit.create_app(echo, **json.loads(sys.argv[1]))
with TestClient(app, base_url="http://localhost") as client:
    print(json.dumps(client.get("/settings").json()))
"""


def settings_of_app(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], **arguments: Any
) -> dict[str, Any]:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = run_script(ASK, json.dumps(arguments), warnings="ignore")  # of Starlette about its own client
    settings: dict[str, Any] = json.loads(done.stdout)
    return settings


def test_order_of_sources_for_create_app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code, environment, file, default."""
    file = tmp_path / "settings.toml"
    file.write_text("max_batch_size = 2\nmax_wait_ms = 2\nmax_queue_size = 2\n")
    variables = {
        "SERVING_KIT_SETTINGS": str(file),
        "SERVING_KIT_MAX_BATCH_SIZE": "3",
        "SERVING_KIT_MAX_WAIT_MS": "3",
        "SERVING_KIT_TIMEOUT_MS": "",  # set to nothing: not set
    }
    settings = settings_of_app(monkeypatch, variables, max_batch_size=4)
    assert [settings[name] for name in ("max_batch_size", "max_wait_ms", "max_queue_size", "timeout_ms")] == [
        4,
        3.0,
        2,
        10000.0,
    ]


def test_serve_ignores_environment(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVING_KIT_MAX_BATCH_SIZE", "3")
    assert serve(lambda texts: texts).settings.max_batch_size == 32


@pytest.mark.parametrize(
    ("variable", "text", "complaint"),
    [
        ("SERVING_KIT_MAX_BATCH_SIZE", "0", "max_batch_size must be a whole number from 1 to 4,096"),
        ("SERVING_KIT_MAX_WAIT_MS", "soon", "max_wait_ms must be a number"),
        ("SERVING_KIT_GROUP_BY_LENGTH", "maybe", "group_by_length must be true or false"),
        ("SERVING_KIT_PORT", "99999", "port must be a whole number from 0 to 65535"),
        ("SERVING_KIT_DRAIN_S", "-1", "drain_s must be a number from 0"),
        ("SERVING_KIT_THREADS", "0", "threads must be a whole number from 1"),
        ("SERVING_KIT_SETTINGS", "/no/such/file.toml", "/no/such/file.toml: it cannot be read"),
    ],
)
def test_bad_value_in_environment(
    variable: str,
    text: str,
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(variable, text)
    source = f"{variable}: " if variable != "SERVING_KIT_SETTINGS" else ""
    with pytest.raises(SettingError, match=f"^{source}{complaint}"):
        serving_kit.create_app(lambda texts: texts)
    assert main(["serve"]) == 2
    assert f"serving-kit: {source}{complaint}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("max_batchsize = 8", r"there is no option named 'max_batchsize'; did you mean max_batch_size\?"),
        ("max_batch_size = true", "max_batch_size must be a whole number"),
        ("max_batch_size = '8'", "max_batch_size must be a whole number"),
        ("model = 8", "model must be a text, got 8"),
        ("allowed_hosts = 'a'", "allowed_hosts must be a list of texts, got 'a'"),
        ("token = 'secret'", "there is no option named 'token'"),
        ("max_batch_size", "it is no TOML"),
        ("[settings]\nmax_batch_size = 8", "there is no option named 'settings'"),
    ],
)
def test_bad_settings_file(
    content: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "my.toml"
    file.write_text(content)
    assert main(["serve", "--settings", str(file)]) == 2
    assert re.search(f"^serving-kit: {re.escape(str(file))}: {complaint}", capsys.readouterr().err)


def test_unknown_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those that Kubernetes sets are not reported."""
    monkeypatch.setenv("SERVING_KIT_MAX_BATCHSIZE", "8")
    # What a pod gets that runs beside a Service of the name serving-kit.
    monkeypatch.setenv("SERVING_KIT_PORT", "tcp://10.0.0.11:8000")
    monkeypatch.setenv("SERVING_KIT_PORT_8000_TCP_ADDR", "10.0.0.11")
    monkeypatch.setenv("SERVING_KIT_SERVICE_HOST", "10.0.0.11")
    monkeypatch.setenv("SERVING_KIT_SERVICE_PORT", "8000")
    monkeypatch.setenv("SERVING_KIT_TOKEN", "a-token")
    with pytest.warns(UserWarning, match="MAX_BATCHSIZE .* did you mean SERVING_KIT_MAX_BATCH_SIZE") as said:
        serving_kit.create_app(lambda texts: texts)
    assert len(said) == 1


def test_every_command_option_has_a_source(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    flags = set(re.findall(r"--[a-z-]+", capsys.readouterr().out.partition("Serve one model.")[0]))
    names = {flag.removeprefix("--").replace("-", "_") for flag in flags} - {"help", "settings"}
    names = {{"allow_host": "allowed_hosts", "allow_origin": "allowed_origins"}.get(n, n) for n in names}
    names = {name for name in names if not name.startswith("no_")}  # the other half of a yes/no option
    assert names | {"model"} == set(OPTIONS)
    assert set(KNOBS) < names


# The command as far as it goes without torch: a substitute prints what it would load.
COMMAND = """
import json, sys
from serving_kit.errors import StartError
from serving_kit.models import loading

def load_model(model, **how):
    print(json.dumps({"model": model, **how}))
    raise StartError("that is all")

loading.load_model = load_model  # before the command imports it
from serving_kit import cli
sys.exit(cli.main(sys.argv[1:]))
"""


def test_order_of_sources_for_command(tmp_path: Path) -> None:
    """Command line, environment, file."""
    file = tmp_path / "settings.toml"
    file.write_text("model = 'of/file'\ntask = 'of-file'\ndevice = 'of-file'\nport = 0\nthreads = 2\n")
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "serve", "of/line", "--settings", str(file)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={
            **os.environ,
            "SERVING_KIT_MODEL": "of/environment",
            "SERVING_KIT_TASK": "of-environment",
            "SERVING_KIT_PRECISION": "fast",
            "SERVING_KIT_TSAK": "misspelt",
        },
    )
    assert done.returncode == 2, done.stderr
    loading, asked = done.stdout.splitlines()
    assert loading == "loading of/line"
    how = json.loads(asked)
    assert how.pop("most_threads") >= 1
    wanted = {"model": "of/line", "task": "of-environment", "device": "of-file", "threads": 2}
    wanted["precision"] = "fast"
    assert {name: how[name] for name in wanted} == wanted
    assert "that is all" in done.stderr
    assert "SERVING_KIT_TSAK is not known and has no effect; did you mean SERVING_KIT_TASK?" in done.stderr
