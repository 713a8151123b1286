"""Hugging Face's own client against a served model that generates text."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

pytest.importorskip("torch")
huggingface_hub = pytest.importorskip("huggingface_hub")

from tests.support_models import chat_pipeline, new_text, tiny

GREEDY = {"do_sample": False, "max_new_tokens": 6}


@pytest.fixture
def pipe() -> Any:
    return chat_pipeline()


@pytest.fixture
def server(serve: Callable[..., Any], pipe: Any) -> Any:
    return serve(pipe)


@pytest.fixture
def client(server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return huggingface_hub.InferenceClient(server.url)


def test_text_generation(client: Any, pipe: Any) -> None:
    wanted = new_text(pipe, "the river", max_new_tokens=6)
    assert client.text_generation("the river", return_full_text=False, **GREEDY) == wanted
    assert client.text_generation("the river", **GREEDY) == pipe("the river", **GREEDY)[0]["generated_text"]


def test_details(client: Any) -> None:
    answer = client.text_generation("the river", details=True, **GREEDY)
    details = answer.details
    assert (details.finish_reason, details.generated_tokens, details.seed) == ("length", 6, None)
    assert len(details.tokens) == 6
    assert all(token.logprob < 0 and token.text for token in details.tokens)


def test_stream(client: Any, pipe: Any) -> None:
    pieces = list(client.text_generation("the river", stream=True, **GREEDY))
    assert "".join(pieces) == new_text(pipe, "the river", max_new_tokens=6)
    assert len(pieces) > 2


def test_stream_with_details(client: Any, pipe: Any) -> None:
    *events, last = client.text_generation("the river", stream=True, details=True, **GREEDY)
    assert [event.index for event in [*events, last]] == list(range(1, len(events) + 2))
    assert all(event.token.logprob < 0 and event.generated_text is None for event in events)
    assert (
        last.generated_text
        == new_text(pipe, "the river", max_new_tokens=6)
        == "".join(each.token.text for each in events)
    )
    assert (last.details.finish_reason, last.details.generated_tokens) == ("length", 6)
    assert last.details.input_length == 4


def test_stop(client: Any, pipe: Any) -> None:
    """The stop string is part of the text, as in text-generation-inference."""
    text = new_text(pipe, "the river", max_new_tokens=6)
    stop = text.split()[1]
    answer = client.text_generation("the river", stop=[stop], details=True, return_full_text=False, **GREEDY)
    assert answer.generated_text == text[: text.index(stop) + len(stop)]
    assert answer.details.finish_reason == "stop_sequence"


def test_seed(client: Any) -> None:
    asked = {"do_sample": True, "temperature": 5.0, "max_new_tokens": 8, "details": True}
    first, again, other = (client.text_generation("the river", seed=seed, **asked) for seed in (3, 3, 4))
    assert first.generated_text == again.generated_text != other.generated_text
    assert first.details.seed == 3


def test_chat_completion(client: Any, pipe: Any) -> None:
    messages = [{"role": "user", "content": "the river"}]
    answer = client.chat_completion(messages, max_tokens=6, temperature=0)
    assert answer.choices[0].message.content == new_text(pipe, messages, max_new_tokens=6)
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat_completion(messages, max_tokens=6, temperature=0, stream=True)
    ]
    assert "".join(pieces) == answer.choices[0].message.content


@pytest.mark.parametrize(("name", "value"), [("watermark", True), ("best_of", 3), ("top_n_tokens", 2)])
def test_what_is_not_supported_is_told_once(client: Any, name: str, value: object) -> None:
    failed = huggingface_hub.errors.TextGenerationError
    with pytest.raises(failed, match=f"{name} is not supported") as refused:
        client.text_generation("the river", **{name: value})
    assert "model_kwargs" not in str(refused.value)
    assert client.text_generation("the river", watermark=False, best_of=None, **GREEDY)


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({"inputs": ["a", "b"], "stream": True}, "a stream answers one input"),
        ({"inputs": "a", "stream": 2}, "stream must be true or false"),
        ({"inputs": "a", "parameters": {"stop": ["b"], "stop_sequence": "b"}}, "send one of them"),
        ({"inputs": [[{"role": "user"}]]}, "messages with role and content"),
    ],
)
def test_bad_requests(server: Any, body: object, complaint: str) -> None:
    response = httpx.post(server.url, json=body)
    assert response.status_code == 400
    assert complaint in response.json()["error"]


def test_groups_have_details_and_no_seed(serve: Callable[..., Any], pipe: Any) -> None:
    """Of a model that generates in groups, the tokens say how many there are and why the text has ended."""
    server = serve(pipe, shortcuts=False)
    asked = {"inputs": "the river", "parameters": {**GREEDY, "details": True}}
    (answer,) = httpx.post(server.url, json=asked).json()
    assert (answer["details"]["generated_tokens"], answer["details"]["finish_reason"]) == (6, "length")
    refused = httpx.post(server.url, json={"inputs": "a", "parameters": {"seed": 1}})
    assert refused.status_code == 422
    assert "seed is not supported here" in refused.json()["error"]
    streamed = httpx.post(server.url, json={**asked, "stream": True})
    assert streamed.status_code == 200
    assert answer["details"]["finish_reason"] in streamed.text


def test_prompt_tokens_of_a_group_are_without_padding(serve: Callable[..., Any], pipe: Any) -> None:
    server = serve(pipe, shortcuts=False, max_wait_ms=300)
    asked = {
        "inputs": ["the river", "the river runs past a stone house"],
        "parameters": {**GREEDY, "details": True},
    }
    short, long = httpx.post(server.url, json=asked).json()
    assert (short[0]["details"]["prompt_tokens"], long[0]["details"]["prompt_tokens"]) == (4, 9)


def test_other_tasks_have_no_streams(serve: Callable[..., Any]) -> None:
    server = serve(tiny("fill-mask"))
    response = httpx.post(server.url, json={"inputs": "a [MASK]", "stream": True})
    assert response.status_code == 400
    assert "fill-mask has no streams" in response.json()["error"]
