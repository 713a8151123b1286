"""Continuous batching through the server: long prompts, a bounded cache, and what is said about both."""

import concurrent.futures
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")

import serving_kit
from tests.support_models import example, fresh, plain, tiny

GREEDY = {"do_sample": False}
Serve = Callable[..., Any]


def test_texts_that_do_not_fit_together_are_all_answered(serve: Serve) -> None:
    """Each is what the pipeline gives, whichever had to give its cache back meanwhile."""
    pipe = tiny("text-generation")
    texts = [example("text-generation", 3 + 2 * n) for n in range(8)]
    parameters = GREEDY | {"max_new_tokens": 30}
    wanted = [plain(pipe(text, **parameters)) for text in texts]
    server = serve(fresh("text-generation"), max_cache_tokens=90, inter_token_target_ms=1)
    with concurrent.futures.ThreadPoolExecutor(len(texts)) as clients:
        answers = list(clients.map(lambda text: server(text, **parameters), texts))
    assert [plain(each) for each in answers] == wanted
    generation = server.stats()["generation"]
    assert generation["evicted_sequences"] > 0
    assert generation["generated_tokens"] == 8 * 30
    assert (generation["running"], generation["cached_tokens"]) == (0, 0)


def test_text_that_the_cache_cannot_hold(serve: Serve) -> None:
    """It is refused with the numbers; the limit counts from the next text on."""
    server = serve(fresh("text-generation"), max_cache_tokens=20)
    with pytest.raises(serving_kit.InputRejected, match=r"may get 50 more; .* holds 20 \(max_cache_tokens\)"):
        server("the river", **GREEDY, max_new_tokens=50)
    assert server("the river", **GREEDY, max_new_tokens=2)
    server.tune(max_cache_tokens="auto")
    assert server("the river", **GREEDY, max_new_tokens=50)


def test_default_limit_is_said(serve: Serve) -> None:
    server = serve(fresh("text-generation"))
    limit = server.stats()["generation"]["max_cache_tokens"]
    assert limit > 1000
    assert server.settings.max_cache_tokens == "auto"


def test_times_between_tokens(serve: Serve) -> None:
    server = serve(fresh("text-generation"))
    list(server.stream("the river", **GREEDY, max_new_tokens=5))
    stats = server.stats(series=30)
    window = stats["generation"]["window"]
    assert window["first_token_ms"]["p50"] > 0
    assert window["inter_token_ms"]["p50"] > 0
    assert stats["generation"]["generated_tokens"] == 5
    assert stats["generation"]["prompt_tokens"] > 0
    assert any(each["tokens"] for each in stats["series"])


def test_other_models_have_no_cache(serve: Serve) -> None:
    assert serve(lambda values: values).stats()["generation"] is None
