"""OpenAI's own client against a served model that generates text."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from serving_kit.errors import MalformedRequest
from serving_kit.http.dialects.openai import OPENAI

openai = pytest.importorskip("openai")

from tests.support_models import fresh, new_text, tiny

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the river"}]
CHAT, COMPLETIONS = OPENAI.predictions
GREEDY = {"temperature": 0, "max_tokens": 6}


@pytest.fixture
def pipe() -> Any:
    """A pipeline with random weights and a chat template."""
    pipe = fresh("text-generation")
    pipe.tokenizer.chat_template = TEMPLATE
    return pipe


@pytest.fixture
def server(serve: Callable[..., Any], pipe: Any) -> Any:
    return serve(pipe)


@pytest.fixture
def client(server: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_completion(client: Any, pipe: Any) -> None:
    answer = client.completions.create(model="any", prompt="the river", **GREEDY)
    assert (answer.object, answer.model) == ("text_completion", "any")
    assert answer.choices[0].text == new_text(pipe, "the river", max_new_tokens=6)
    assert (answer.choices[0].finish_reason, answer.choices[0].logprobs) == ("length", None)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        4,
        6,
        10,
    )


def test_chat(client: Any, pipe: Any) -> None:
    answer = client.chat.completions.create(model="any", messages=MESSAGES, **GREEDY)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == new_text(pipe, MESSAGES, max_new_tokens=6)
    assert answer.usage.completion_tokens == 6


def test_content_in_parts(client: Any, pipe: Any) -> None:
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "river"}]}
    ]
    answer = client.chat.completions.create(model="any", messages=parts, **GREEDY)
    whole = [{"role": "user", "content": "the river"}]
    assert answer.choices[0].message.content == new_text(pipe, whole, max_new_tokens=6)


def test_streamed_completion(client: Any, pipe: Any) -> None:
    stream = client.completions.create(
        model="any", prompt="the river", stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    *chunks, ended, usage = list(stream)
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert text == new_text(pipe, "the river", max_new_tokens=6)
    assert len(chunks) > 1
    assert ended.choices[0].finish_reason == "length"
    assert (usage.choices, usage.usage.completion_tokens) == ([], 6)
    assert len({chunk.id for chunk in [*chunks, ended, usage]}) == 1


def test_streamed_chat(client: Any, pipe: Any) -> None:
    first, *chunks, ended = client.chat.completions.create(
        model="any", messages=MESSAGES, stream=True, logprobs=True, **GREEDY
    )
    assert (first.object, first.choices[0].delta.role) == ("chat.completion.chunk", "assistant")
    text = "".join(chunk.choices[0].delta.content for chunk in chunks)
    assert text == new_text(pipe, MESSAGES, max_new_tokens=6)
    assert all(chunk.choices[0].logprobs.content[0].logprob < 0 for chunk in chunks)
    assert (ended.choices[0].delta.content, ended.choices[0].finish_reason) == (None, "length")


def test_stream_ends_with_done(server: Any) -> None:
    body = {"prompt": "the river", "stream": True, **GREEDY}
    response = httpx.post(f"{server.url}/v1/completions", json=body)
    assert response.headers["content-type"] == "text/event-stream"
    assert response.headers["cache-control"] == "no-cache"
    assert response.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("streamed", [False, True])
def test_stop_string_is_cut_off(client: Any, pipe: Any, streamed: bool) -> None:
    text = new_text(pipe, "the river", max_new_tokens=6)
    stop = text.split()[2]
    asked = {"model": "any", "prompt": "the river", "stop": [stop, "unseen"], **GREEDY}
    if streamed:
        chunks = list(client.completions.create(**asked, stream=True))
        choice, got = chunks[-1].choices[0], "".join(chunk.choices[0].text for chunk in chunks)
    else:
        choice = client.completions.create(**asked).choices[0]
        got = choice.text
    assert got == text[: text.index(stop)]
    assert choice.finish_reason == "stop"


def test_several_prompts_and_choices(client: Any, pipe: Any) -> None:
    answer = client.completions.create(model="any", prompt=["the river", "paris"], n=2, **GREEDY)
    wanted = [new_text(pipe, prompt, max_new_tokens=6) for prompt in ("the river", "paris")]
    assert [each.text for each in answer.choices] == [wanted[0], wanted[0], wanted[1], wanted[1]]
    assert [each.index for each in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.completion_tokens == 24


def test_seed_gives_the_same_text(client: Any) -> None:
    asked = {"model": "any", "prompt": "the river", "temperature": 5.0, "max_tokens": 8}
    first, again, other = (
        client.completions.create(**asked, seed=seed).choices[0].text for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other


def test_logprobs(client: Any) -> None:
    completion = client.completions.create(model="any", prompt="the river", logprobs=1, **GREEDY)
    assert len(completion.choices[0].logprobs.token_logprobs) == 6
    chat = client.chat.completions.create(model="any", messages=MESSAGES, logprobs=True, **GREEDY)
    assert all(each.logprob < 0 for each in chat.choices[0].logprobs.content)


def test_models(client: Any, server: Any) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object) == (server._service.model_name, "model")


@pytest.mark.light
@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"prompt": "a", "response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"prompt": "a", "tool_choice": "required"}, "tool_choice is not supported"),
        ({"prompt": "a", "best_of": 3}, "best_of is not supported"),
        ({"prompt": "a", "spam": 3}, "'spam' is not supported"),
        ({"prompt": [1, 2]}, "no token ids"),
        ({"prompt": []}, "prompt must be"),
        ({"prompt": "a", "stop": [""]}, "stop must be"),
        ({"prompt": "a", "n": 99}, "n must be a whole number from 1 to 16"),
        ({"prompt": "a", "n": 2, "seed": 1}, "leave n or seed out"),
        ({"prompt": "a", "n": 2, "stream": True}, "a stream has one choice"),
        ({"prompt": "a", "stream": 1}, "stream must be true or false"),
        ({"prompt": "a", "stream_options": 1}, "stream_options must be an object"),
        ([], "must be a JSON object"),
    ],
)
def test_bad_completions(asked: object, complaint: str) -> None:
    with pytest.raises(MalformedRequest, match=complaint):
        COMPLETIONS.decode(json.dumps(asked).encode(), {}, "text-generation")


@pytest.mark.light
@pytest.mark.parametrize(
    "messages",
    [[], "hello", [{"role": "user"}], [{"content": "a"}], [{"role": "user", "content": [{"type": "image"}]}]],
)
def test_bad_messages(messages: object) -> None:
    with pytest.raises(MalformedRequest, match="message"):
        CHAT.decode(json.dumps({"messages": messages}).encode(), {}, "text-generation")


def test_bad_requests_have_the_shape_of_openai(server: Any) -> None:
    for asked in ({"temperature": "hot"}, {"max_tokens": 0}, {"spam": 1}):
        response = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", **asked})
        error = response.json()["error"]
        assert response.status_code == 400
        assert (error["type"], error["code"]) == ("invalid_request_error", "malformed_request")
        assert error["request_id"] == response.headers["x-request-id"]


def test_no_chat_template(serve: Callable[..., Any]) -> None:
    server = serve(fresh("text-generation"))
    response = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": MESSAGES})
    assert response.status_code == 422
    assert "no chat template" in response.json()["error"]["message"]


def test_stream_that_is_refused_has_a_status(server: Any) -> None:
    asked = {"prompt": "a " * 500, "stream": True}
    response = httpx.post(f"{server.url}/v1/completions", json=asked)
    assert response.status_code == 422
    assert "this model takes 128 at most" in response.json()["error"]["message"]


def test_stream_that_fails_ends_with_an_error(
    server: Any, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, steps = server._service.model.decoder, iter(range(2))
    logits = decoder.logits

    def fails_later(*given: Any) -> Any:
        next(steps)
        return logits(*given)

    monkeypatch.setattr(decoder, "logits", fails_later)
    stream = client.completions.create(model="any", prompt="the river", stream=True, **GREEDY)
    with pytest.raises(openai.APIError, match="the model failed"):
        list(stream)
    monkeypatch.undo()
    assert client.completions.create(model="any", prompt="the river", **GREEDY).choices


def test_stream_whose_time_is_up_ends_with_an_error(serve: Callable[..., Any], pipe: Any) -> None:
    server = serve(pipe, stream_timeout_ms=1, timeout_ms=300)
    slow = server._service.model.decoder
    logits = slow.logits

    def wait(*given: Any) -> Any:
        time.sleep(0.05)
        return logits(*given)

    slow.logits = wait
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(model="any", prompt="a", stream=True, temperature=0, max_tokens=60)
        with pytest.raises(openai.APIError, match="not answered within 300 ms"):
            list(stream)


def test_client_that_leaves_a_stream_frees_its_place(server: Any, client: Any) -> None:
    stream = client.completions.create(model="any", prompt="a", stream=True, temperature=0, max_tokens=100)
    next(iter(stream))
    stream.close()
    assert client.completions.create(model="any", prompt="the river", **GREEDY).choices
    assert server.stats()["in_flight"] == 0


def test_other_tasks_are_told(serve: Callable[..., Any]) -> None:
    server = serve(tiny("fill-mask"))
    response = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"})
    assert response.status_code == 400
    assert "this server answers fill-mask, not text generation" in response.json()["error"]["message"]
