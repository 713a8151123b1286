"""What `serve()` says of a model that it cannot find, and that it says so soon. No network."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import serving_kit
from serving_kit import StartError
from serving_kit.models.loading import load_model
from serving_kit.models.pipeline import PipelineModel
from tests.support import REPOSITORY
from tests.support_models import fresh, minilm_folder, tiny

pytest.importorskip("torch")

ASK = """
import sys, serving_kit
try:
    serving_kit.serve(sys.argv[1], port=0)
except serving_kit.StartError as error:
    print(error)
"""


class Hub:
    """A port that closes every connection without an answer, and counts them."""

    def __init__(self) -> None:
        self.calls = 0
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._sock.getsockname()[1]}"
        self._thread = threading.Thread(target=self._answer)
        self._thread.start()

    def _answer(self) -> None:
        while True:
            connection, _ = self._sock.accept()
            with connection:
                if connection.recv(1) == b"!":
                    return
                self.calls += 1

    def close(self) -> None:
        with socket.create_connection(self._sock.getsockname()) as last:
            last.sendall(b"!")
        self._thread.join()
        self._sock.close()


def test_hub_that_does_not_answer(
    tmp_path: Path,
) -> None:
    """An id that is not in the cache is refused after one request to the Hub."""
    hub = Hub()
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "NO_PROXY": "127.0.0.1"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", ASK, "no-such/model"],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
            env=environment,
        )
    finally:
        hub.close()
    assert "it is not on this machine and the Hub cannot be reached" in done.stdout
    assert hub.calls == 1
    assert "Retrying" not in done.stderr


def test_cached_model_without_the_hub(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--some--encoder" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(minilm_folder(), target_is_directory=True)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123")
    script = """
import serving_kit
with serving_kit.serve("some/encoder", task="feature-extraction", port=0) as server:
    print(server.stats()["model"], len(server("hello")[0][0]))
"""
    hub = Hub()
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "NO_PROXY": "127.0.0.1"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=environment,
        )
    finally:
        hub.close()
    assert done.returncode == 0, done.stderr
    assert "encoder 384" in done.stdout
    assert hub.calls == 1


def folder(path: Path, architecture: str) -> Path:
    (path / "config.json").write_text(json.dumps({"architectures": [architecture], "model_type": "bert"}))
    return path


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("BertForMaskedLM", "fill-mask"),
        ("RobertaForSequenceClassification", "text-classification"),
        ("GPT2LMHeadModel", "text-generation"),
        ("BertModel", "feature-extraction"),
    ],
)
def test_folder_without_a_task(tmp_path: Path, architecture: str, task: str) -> None:
    """The error names the task to pass."""
    with pytest.raises(StartError, match=f"its task cannot be found out here.*task='{task}'"):
        serving_kit.serve(folder(tmp_path, architecture), port=0)


def test_unknown_architecture(tmp_path: Path) -> None:
    """The error has an example."""
    with pytest.raises(StartError, match="Pass it: such as task='fill-mask'"):
        serving_kit.serve(folder(tmp_path, "Unknown"), port=0)


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="it holds no model"):
        serving_kit.serve(tmp_path, port=0)


def test_folder_and_pipeline(tmp_path: Any) -> None:
    pipe = tiny("fill-mask")
    pipe.save_pretrained(tmp_path / "my-model")
    model = load_model(tmp_path / "my-model", task="fill-mask", device="cpu")
    assert isinstance(model, PipelineModel)
    assert (model.name, model.task_name, model.device) == ("my-model", "fill-mask", "cpu")
    held = load_model(pipe)
    assert isinstance(held, PipelineModel)
    assert held.pipe.model.base_model.embeddings.word_embeddings.weight is (
        pipe.model.base_model.embeddings.word_embeddings.weight
    )
    plain = load_model(pipe, shortcuts=False)
    assert isinstance(plain, PipelineModel)
    assert plain.pipe.model is pipe.model


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ({"model": "no/such/model/anywhere", "task": "fill-mask"}, "no folder and no public model"),
        ({"model": "/no/such/folder", "task": "fill-mask"}, "no folder and no public model"),
        ({"model": "no-owner/no-such-model", "task": "fill-mask"}, "the Hub cannot be reached"),
        ({"model": "x/y", "task": "fill-masc"}, "Unknown task fill-masc"),
        ({"model": 42}, "cannot serve int: pass a Hub id"),
        ({"model": len, "task": "fill-mask"}, "are for loading a model by its id"),
    ],
)
def test_advice(arguments: dict[str, Any], advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no network in tests
    with pytest.raises(StartError, match=advice):
        load_model(**arguments)


def test_out_of_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: out of memory: 1 TB")

    monkeypatch.setattr("transformers.pipeline", no_memory)
    with pytest.raises(StartError, match=r"smaller model.*stop_first=True"):
        load_model(tmp_path, task="fill-mask")


async def asynchronous(texts: list[str]) -> list[str]:
    return texts


def test_async_function_is_refused() -> None:
    with pytest.raises(StartError, match="not async"):
        load_model(asynchronous)


def test_model_that_fails_on_its_example() -> None:
    pipe = fresh("fill-mask")
    pipe.model.cls.forward = None
    with pytest.raises(StartError, match="is loaded, but cannot answer: TypeError"):
        load_model(pipe)
