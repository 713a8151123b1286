"""Streams in a cell: `server.stream` for `for` and `async for`, and `server.chat`."""

import asyncio
import re
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import serving_kit
from tests.support_models import chat_pipeline, fresh, new_text, tiny

GREEDY = {"do_sample": False, "max_new_tokens": 6}
MESSAGES = [{"role": "user", "content": "the river"}]


@pytest.fixture
def pipe() -> Any:
    return chat_pipeline()


@pytest.fixture
def server(serve: Callable[..., Any], pipe: Any) -> Any:
    return serve(pipe)


def idle(server: Any) -> bool:
    """Whether it becomes idle within some seconds."""
    until = time.monotonic() + 10
    while server.stats()["in_flight"] and time.monotonic() < until:
        time.sleep(0.01)
    return not server.stats()["in_flight"]


def test_joined_pieces_are_the_new_text(server: Any, pipe: Any) -> None:
    pieces = list(server.stream("the river", **GREEDY))
    assert len(pieces) > 2
    assert "".join(pieces) == new_text(pipe, "the river", max_new_tokens=6)


def test_async_for(server: Any, pipe: Any) -> None:
    async def main() -> list[str]:
        return [piece async for piece in server.stream("the river", **GREEDY)]

    assert "".join(asyncio.run(main())) == new_text(pipe, "the river", max_new_tokens=6)


def test_chat(server: Any, pipe: Any) -> None:
    assert server.chat(MESSAGES, **GREEDY) == new_text(pipe, MESSAGES, max_new_tokens=6)
    assert "".join(server.stream(MESSAGES, **GREEDY)) == new_text(pipe, MESSAGES, max_new_tokens=6)


def test_no_chat_template(serve: Callable[..., Any]) -> None:
    with pytest.raises(serving_kit.InputRejected, match="no chat template"):
        serve(fresh("text-generation")).chat(MESSAGES)


def test_stream_left_early_ends_the_request(server: Any) -> None:
    with server.stream("a", do_sample=False, max_new_tokens=100) as stream:
        next(stream)
    assert idle(server)
    forgotten = server.stream("a", do_sample=False, max_new_tokens=100)
    next(forgotten)
    del forgotten
    assert idle(server)
    assert server.stats()["requests"]["cancelled"] == 2


def test_stream_that_was_never_begun(server: Any) -> None:
    server.stream("a").close()
    assert server.stats()["requests"]["cancelled"] == 0


def test_document_of_text_generation(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Its code runs, and its commands get answers."""
    text = (Path(__file__).parents[1] / "docs" / "text_generation.md").read_text()
    _, *code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    capsys.readouterr()
    for block in code:
        exec(block, {"server": server})
    assert len(capsys.readouterr().out.split()) > 10
    commands = re.findall(r"^\$ (curl .*)$", text, re.M)
    assert len(commands) == 4
    for command in commands:
        own = shlex.split(command.replace("http://127.0.0.1:8000", server.url))
        done = subprocess.run([*own, "--silent"], capture_output=True, text=True, check=True, timeout=30)
        assert "error" not in done.stdout
        assert done.stdout.startswith(("data: ", "{"))


def test_errors_are_those_of_a_call(server: Any) -> None:
    with pytest.raises(serving_kit.MalformedRequest, match="max_new_tokens must be"):
        list(server.stream("a", max_new_tokens=0))
    with pytest.raises(serving_kit.InputRejected, match="this model takes 128 at most"):
        list(server.stream("a " * 500))
    server.stop()
    with pytest.raises(serving_kit.Unavailable):
        list(server.stream("a"))


def test_other_tasks_have_no_streams(serve: Callable[..., Any]) -> None:
    with pytest.raises(serving_kit.MalformedRequest, match="fill-mask has no streams"):
        list(serve(tiny("fill-mask")).stream("a [MASK]"))
