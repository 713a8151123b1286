"""Many sequences in one step: each gets the text that it gets alone, and fails alone."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from serving_kit.events import Chunk
from serving_kit.model import Done, Failed, More, Part, Prepared
from serving_kit.models.pipeline import PipelineModel, build_pipeline_model
from serving_kit.service import Service
from tests.support_models import example, fresh, plain, tiny

GREEDY = {"do_sample": False}


def run(model: PipelineModel, running: dict[str, Prepared[Any]]) -> dict[str, object]:
    """One step of all of them. Returns the answers of those that have ended."""
    results = model.step([Part(each, each.work.tokens) for each in running.values()])
    ended = {}
    for (name, prepared), result in zip(list(running.items()), results, strict=True):
        if isinstance(result, Done):
            ended[name] = plain(model.finish(prepared, result.output))
            del running[name]
    return ended


def test_text_in_company_is_the_text_alone() -> None:
    """They join one after the other, and end at different times."""
    pipe = tiny("text-generation")
    model = build_pipeline_model(pipe)
    wanted, answers, running = {}, {}, {}
    for number in range(12):
        if number < 6:
            text, parameters = (
                example("text-generation", 2 + 7 * number),
                GREEDY | {"max_new_tokens": 9 - number},
            )
            wanted[text] = plain(pipe(text, **parameters))
            running[text] = model.prepare(text, parameters)
        if running:
            answers |= run(model, running)
    assert answers == wanted


def test_failed_step_can_be_run_again() -> None:
    pipe = fresh("text-generation")
    model = build_pipeline_model(pipe)
    text, parameters = "the river", GREEDY | {"max_new_tokens": 6}
    running = {text: model.prepare(text, parameters)}
    run(model, running)
    sequence = running[text].payload.sequence
    assert sequence is not None
    before = (list(sequence.ids), sequence.cache.length)
    hook = model.pipe.model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(model, running)
    hook.remove()
    assert (list(sequence.ids), sequence.cache.length) == before
    answers: dict[str, object] = {}
    while running:
        answers |= run(model, running)
    assert answers == {text: plain(pipe(text, **parameters))}


def test_sequence_that_cannot_go_on_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny("text-generation")
    model = build_pipeline_model(pipe)
    good, bad = (model.prepare("the river", GREEDY | {"max_new_tokens": 3}) for _ in range(2))
    assert bad.payload.sequence is not None
    broken = bad.payload.sequence
    monkeypatch.setattr(type(broken), "has_ended", lambda self: 1 / (self is not broken) > 1)
    first, second = model.step([Part(each, each.work.tokens) for each in (good, bad)])
    assert isinstance(second, Failed)
    assert isinstance(second.error, ZeroDivisionError)
    assert isinstance(first, Done | More)


def test_released_sequence_holds_no_cache() -> None:
    model = build_pipeline_model(tiny("text-generation"))
    prepared = model.prepare("the river", GREEDY | {"max_new_tokens": 6})
    model.step([Part(prepared, prepared.work.tokens)])
    assert prepared.payload.sequence is not None
    assert prepared.payload.sequence.cache.capacity > 0
    model.release(prepared)
    model.release(prepared)
    assert prepared.payload.sequence.cache.capacity == 0


def test_prompt_in_parts_gives_the_same_text() -> None:
    """Beside a text that is being generated; no token is chosen before the prompt has ended."""
    pipe = tiny("text-generation")
    model = build_pipeline_model(pipe)
    texts = [example("text-generation", 20), example("text-generation", 30)]
    parameters = GREEDY | {"max_new_tokens": 6}
    short, long = (model.prepare(text, parameters) for text in texts)
    ended: dict[str, object] = {}
    work = {"short": short.work, "long": long.work}
    running = {"short": short, "long": long}
    while running:
        parts = [Part(each, min(7, work[name].tokens)) for name, each in running.items()]
        for (name, prepared), part, result in zip(
            list(running.items()), parts, model.step(parts), strict=True
        ):
            if isinstance(result, Done):
                assert result.generated == 1
                ended[name] = plain(model.finish(prepared, result.output))
                del running[name]
                continue
            assert isinstance(result, More)
            assert result.generated == (part.tokens == work[name].tokens)
            assert result.work.context_tokens == work[name].context_tokens + part.tokens
            work[name] = result.work
    assert [ended["short"], ended["long"]] == [plain(pipe(text, **parameters)) for text in texts]


def test_text_whose_cache_was_given_back_goes_on() -> None:
    """Its next step computes again what the cache held; also the random numbers go on."""
    pipe = tiny("text-generation")
    model = build_pipeline_model(pipe)
    parameters = {"do_sample": True, "seed": 5, "max_new_tokens": 8}
    wanted: dict[str, object] = {}
    running = {"undisturbed": model.prepare("the river", parameters)}
    while running:
        wanted |= run(model, running)
    answers: dict[str, object] = {}
    running = {"disturbed": model.prepare("the river", parameters)}
    for count in range(20):
        if count % 3 == 2 and running:
            model.release(running["disturbed"])
        if running:
            prepared = running["disturbed"]
            (result,) = model.step([Part(prepared, 100)])
            if isinstance(result, Done):
                answers["disturbed"] = plain(model.finish(prepared, result.output))
                del running["disturbed"]
    assert answers["disturbed"] == wanted["undisturbed"]


def test_next_step_costs_one_token() -> None:
    model = build_pipeline_model(tiny("text-generation"))
    prepared = model.prepare("the river", GREEDY | {"max_new_tokens": 6})
    (result,) = model.step([Part(prepared, prepared.work.tokens)])
    assert isinstance(result, More)
    assert result.work.tokens == 1
    assert result.work.context_tokens == prepared.work.tokens


def test_token_that_cannot_be_chosen_fails_alone() -> None:
    """Its neighbour gets the text that it gets alone."""
    pipe = tiny("text-generation")
    model = build_pipeline_model(pipe)
    parameters = GREEDY | {"max_new_tokens": 3}
    good, bad = (model.prepare("the river", parameters | {"repetition_penalty": n}) for n in (1.5, 1.7))
    assert bad.payload.sequence is not None
    bad.payload.sequence.rules.processors.append(lambda *_: 1 / 0)
    _, failed = model.step([Part(each, each.work.tokens) for each in (good, bad)])
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, ZeroDivisionError)
    answers, running = {}, {"good": good}
    while running:
        answers |= run(model, running)
    assert answers["good"] == plain(pipe("the river", **parameters, repetition_penalty=1.5))


def test_only_streams_have_chunks() -> None:
    """No other item pays for decoding them."""
    model = build_pipeline_model(tiny("text-generation"))
    streamed, silent = (model.prepare("the river", GREEDY | {"max_new_tokens": 2}) for _ in range(2))
    for kind in (More, Done):
        tokens = streamed.work.tokens if kind is More else 1
        one, other = model.step([Part(streamed, tokens, streamed=True), Part(silent, tokens)])
        assert isinstance(one, kind)
        assert isinstance(other, kind)
        assert one.chunk
        assert other.chunk is None


@pytest.mark.parametrize("new", [1, 8])
def test_joined_chunks_are_the_new_text(new: int) -> None:
    """Of a stream through the queue; the last chunk comes with the answer, before it."""
    pipe = tiny("text-generation")
    parameters = GREEDY | {"max_new_tokens": new, "return_full_text": False}

    async def main() -> list[Any]:
        service = Service(build_pipeline_model(pipe))
        await service.start()
        with service.observe() as ticket:
            events = [each async for each in service.stream("the river", parameters, ticket, 60.0)]
        assert await service.stop()
        return events

    *chunks, answer = asyncio.run(main())
    assert {type(each) for each in chunks} == {Chunk}
    assert plain(answer.value) == plain(pipe("the river", **parameters))
    assert "".join(each.value.text for each in chunks) == answer.value[0]["generated_text"]


def test_sixteen_clients_share_steps(serve: Callable[..., Any]) -> None:
    pipe = tiny("text-generation")
    server = serve(pipe)
    asked = [(example("text-generation", 3 + n % 5), 2 + 3 * (n % 4)) for n in range(16)]
    with ThreadPoolExecutor(16) as clients:
        given = list(clients.map(lambda one: server(one[0], max_new_tokens=one[1], do_sample=False), asked))
    wanted = [pipe(text, max_new_tokens=most, do_sample=False) for text, most in asked]
    assert [plain(each) for each in given] == [plain(each) for each in wanted]
    assert server.stats()["batches"]["continued"] > 0
    assert server.stats()["layout"]["packed"]
