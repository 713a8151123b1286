"""What cannot share a forward runs alone, whatever the default of `max_batch_size`, and the kit says so."""

import copy
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

pytest.importorskip("torch")
pytest.importorskip("PIL.Image")

import serving_kit
from serving_kit.errors import SettingError, StartError
from tests.support import until
from tests.support_models import IMAGE_TASKS, PARAMETERS, SOUND_TASKS, image_file, tiny, without_pad_token

Serve = Callable[..., Any]
WHY_MEDIA = "inputs of this task are answered one by one"


def test_images_run_one_by_one(serve: Serve) -> None:
    pipe = copy.copy(tiny("image-classification"))
    pipe.model = copy.deepcopy(pipe.model)
    allowed = threading.Semaphore(0)
    pipe.model.register_forward_pre_hook(lambda *_: assert_acquired(allowed))
    server = serve(pipe, timeout_ms=60_000, drop_hopeless=False)
    with ThreadPoolExecutor(9) as clients:
        requests = [
            clients.submit(httpx.post, server.url, content=image_file(), timeout=60) for _ in range(9)
        ]
        until(lambda: server.stats()["queue_depth"] == 8, timeout=30)
        for answered in range(1, 10):
            allowed.release()
            until(lambda n=answered: sum(each.done() for each in requests) >= n, timeout=30)
        assert [each.result().status_code for each in requests] == [200] * 9
    sizes = {size for point in server.stats(series=120)["series"] for size in point["sizes"]}
    assert {int(size) for size in sizes} == {1}


def assert_acquired(allowed: threading.Semaphore) -> None:
    assert allowed.acquire(timeout=60)


@pytest.mark.parametrize("task", [*IMAGE_TASKS, *SOUND_TASKS, "text-to-audio"])
def test_lowered_default_has_a_note(serve: Serve, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    server = serve(tiny(task))
    line = f"max_batch_size is 1: {WHY_MEDIA}"
    assert server.settings.max_batch_size == 1
    assert line in capsys.readouterr().out
    assert line in server.stats()["notes"]
    told = httpx.get(f"{server.url}/info").json()
    assert (told["max_batch_size"], told["notes"]) == (1, [line])
    with pytest.raises(SettingError, match=rf"max_batch_size must be 1 .*, got 8: {WHY_MEDIA}"):
        server.tune(max_batch_size=8)
    refused = httpx.patch(
        f"{server.url}/settings",
        json={"max_batch_size": 8},
        headers={"authorization": f"Bearer {server.token}"},
    )
    assert refused.status_code in (400, 422)
    assert WHY_MEDIA in refused.text
    assert server.tune(timeout_ms=5000).max_batch_size == 1


def test_no_pad_token_no_padded_steps(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = without_pad_token()
    server = serve(pipe)
    out = capsys.readouterr().out
    assert "max_batch_size is 1: its tokenizer has no pad token" in out
    assert "pipe.tokenizer.pad_token = pipe.tokenizer.eos_token" in out
    assert server("the river") == pipe("the river")


def test_generation_needs_no_pad_token(serve: Serve) -> None:
    pipe = without_pad_token("text-generation")
    server = serve(pipe)
    assert server.settings.max_batch_size > 1
    parameters = PARAMETERS["text-generation"]
    assert server("the river", **parameters) == pipe("the river", **parameters)


def test_given_size_is_refused() -> None:
    """`max_batch_size` that a person has set is not lowered."""
    for size in (2, 32):
        with pytest.raises(StartError, match=rf"must be 1 .*got {size}: its tokenizer has no pad token"):
            serving_kit.serve(without_pad_token(), port=0, max_batch_size=size)
    app = serving_kit.create_app(without_pad_token(), max_batch_size=32)
    with pytest.raises(SettingError, match="got 32: its tokenizer has no pad token"):
        run_lifespan(app)


def test_app_lowers_the_default() -> None:
    app = serving_kit.create_app(without_pad_token())
    assert run_lifespan(app).settings.max_batch_size == 1


def run_lifespan(app: Any) -> Any:
    """Start and stop an app; the service that it had."""
    import asyncio

    async def main() -> Any:
        async with app.router.lifespan_context(app):
            return app.state.service

    return asyncio.run(main())


def test_command_shows_the_note(tmp_path: Any) -> None:
    pipe = without_pad_token()
    pipe.model.save_pretrained(tmp_path)
    pipe.tokenizer.save_pretrained(tmp_path)
    command = [
        sys.executable,
        "-m",
        "serving_kit.cli",
        "serve",
        str(tmp_path),
        "--task",
        "text-classification",
    ]
    command += ["--device", "cpu", "--port", "0"]
    refused = subprocess.run(
        [*command, "--max-batch-size", "32"], capture_output=True, text=True, timeout=120, check=False
    )
    assert refused.returncode == 2
    assert "got 32: its tokenizer has no pad token" in refused.stderr
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            said = ""
            for line in process.stdout:
                said += line
                if "token for PATCH" in line:
                    break
        finally:
            process.terminate()
            process.wait(60)
    assert "max_batch_size is 1: its tokenizer has no pad token" in said


def test_no_note_for_a_batching_model(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    server = serve(tiny("fill-mask"))
    assert server.settings.max_batch_size == 32
    assert server.stats()["notes"] == []
    assert "max_batch_size" not in capsys.readouterr().out
