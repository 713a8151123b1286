"""The README's commands and Python code."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

pytest.importorskip("torch")

import serving_kit
from tests.support import REPOSITORY, until
from tests.support_http import free_port

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    """What follows a `$`, with its continuation lines."""
    text = "\n".join(blocks("console"))
    return [re.sub(r"\s*\\\n\s*", " ", found) for found in re.findall(r"^\$ ((?:.*\\\n)*.*)", text, re.M)]


def test_make_targets() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = [command.split()[1] for command in commands() if command.startswith("make ")]
    assert targets == ["demo", "test", "lab"]
    for target in [*targets, "lint", "format"]:
        assert re.search(rf"^{target}:", makefile, re.M)


def test_notebook_code_and_curl() -> None:
    port = 0
    names: dict[str, object] = {}
    ours = [block for block in blocks("python") if "create_app" not in block]
    assert len(ours) == 3
    source = ours[0].replace("serve()", f"serve(port={port})")
    exec(source, names)
    server = names["server"]
    assert isinstance(server, serving_kit.Server)
    for command in commands():
        if command.startswith("curl"):
            arguments = shlex.split(command.replace("http://127.0.0.1:8000/", f"{server.url}/"))
            done = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=30)
            assert "error" not in done.stdout
            assert json.loads(done.stdout)
    exec(ours[2].replace("port=8001", "port=0"), names)
    exec(ours[1], names)
    assert not server.running


def test_commands_without_notebook(tmp_path: Path) -> None:
    (source,) = (block for block in blocks("python") if "create_app" in block)
    (tmp_path / "server.py").write_text(source)
    bin_ = Path(sys.executable).parent
    for command in commands():
        if not command.startswith(("uvicorn", "serving-kit")):
            continue
        program, *arguments = shlex.split(command)
        if "--help" in arguments:
            done = subprocess.run(
                [bin_ / program, *arguments], capture_output=True, text=True, check=True, timeout=30
            )
            assert "--max-batch-size" in done.stdout
            continue
        port = str(free_port())
        arguments = [a for a in arguments if a not in ("--port", "8000")] + ["--port", port]
        with subprocess.Popen(
            [bin_ / program, *arguments], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                url = f"http://127.0.0.1:{port}/"
                until(lambda url=url: _posts(url), timeout=60, what=command)  # type: ignore[misc]
            finally:
                process.terminate()
                process.wait(20)


def _posts(url: str) -> bool:
    try:
        return httpx.post(url, content="a [MASK].", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
