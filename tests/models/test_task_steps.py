"""Every text task over real HTTP: what `curl` gets is what the pipeline returns."""

import json
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

pytest.importorskip("torch")

from serving_kit.errors import StartError
from tests.support_models import (
    LENGTHS,
    PARAMETERS,
    TASKS,
    assert_same,
    example,
    minilm_folder,
    plain,
    tiny,
    without_pad_token,
)

Serve = Callable[..., Any]
WITHOUT_PARAMETERS = [task for task in TASKS if task not in PARAMETERS]


@pytest.mark.parametrize("task", WITHOUT_PARAMETERS)
def test_raw_answer_is_the_pipelines(serve: Serve, task: str) -> None:
    pipe, text = tiny(task), example(task, 12)
    server = serve(pipe, shortcuts=False)
    command = ["curl", "-sS", "-X", "POST", "-d", text, server.url + "/"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    assert json.loads(done.stdout) == plain(pipe(text))


@pytest.mark.parametrize("task", TASKS)
def test_sixteen_clients_at_once(serve: Serve, task: str) -> None:
    """Each gets its own answer."""
    pipe, parameters = tiny(task), PARAMETERS.get(task, {})
    server = serve(pipe)
    before = server.logs()
    texts = [example(task, words) for words in LENGTHS * 4]
    with ThreadPoolExecutor(16) as clients:
        got = list(clients.map(lambda text: plain(server(text, **parameters)), texts))
    for text, answer in zip(texts, got, strict=True):
        assert_same(answer, plain(pipe(text, **parameters)))
    assert sum(server.stats()["batches"].values()) < len(texts), "some of them shared a step"
    assert server.logs() == before, "the library had something to say, which a cell would have shown"


def test_different_parameters_at_once(serve: Serve) -> None:
    pipe = tiny("fill-mask")
    server = serve(pipe, max_wait_ms=20)
    text = example("fill-mask", 9)

    def ask(top_k: int) -> int:
        body = {"inputs": text, "parameters": {"top_k": top_k}}
        return len(httpx.post(server.url, json=body, timeout=30).json())

    asked = [1 + n % 5 for n in range(40)]
    with ThreadPoolExecutor(8) as clients:
        assert list(clients.map(ask, asked)) == asked


def test_missing_mask_fails_alone(serve: Serve) -> None:
    server = serve(tiny("fill-mask"), max_wait_ms=50)
    texts = ["a [MASK]", "no mask", "b [MASK]"]
    with ThreadPoolExecutor(3) as clients:
        answers = list(clients.map(lambda t: httpx.post(server.url, content=t, timeout=30), texts))
    assert [a.status_code for a in answers] == [200, 422, 200]
    assert answers[1].json()["error"] == "No mask_token ([MASK]) found on the input"
    listed = httpx.post(server.url, json={"inputs": texts}, timeout=30)
    assert listed.status_code == 422
    assert listed.json()["error"].startswith("inputs[1]: No mask_token")


def test_a_real_encoder_from_a_folder(serve: Serve) -> None:
    server = serve(minilm_folder(), task="feature-extraction", device="cpu")
    short, long = "a cat", "the quick brown fox jumps over the lazy dog"
    features = httpx.post(server.url, json={"inputs": [short, long]}, timeout=30).json()
    assert [len(each[0]) for each in features] == [4, 11], "no rows for padding"
    assert_same(features[0], server(short))


def test_pipeline_that_cannot_batch(serve: Serve) -> None:
    pipe = without_pad_token()
    with pytest.raises(StartError, match=r"no pad token.*pad_token = .*max_batch_size=1"):
        serve(pipe, max_batch_size=32)
    server = serve(pipe, max_batch_size=1)
    assert server("the river") == pipe("the river")
    with pytest.raises(ValueError, match="no pad token"):
        server.tune(max_batch_size=2)


def test_words_of_the_bundled_model(serve: Serve) -> None:
    server = serve(None)
    assert (server.stats()["model"], server.stats()["task"]) == ("serving-kit-demo", "fill-mask")
    answer = server("the cat sat on the [MASK].")
    assert len(answer) == 5
    assert all(each["token_str"].isalpha() for each in answer)
