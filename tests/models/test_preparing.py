"""What is rejected before the model call, and what may share one."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from serving_kit.errors import InputRejected, MalformedRequest
from serving_kit.model import Work
from serving_kit.models.pipeline import build_pipeline_model
from tests.support_models import PARAMETERS, TASKS, example, parts, plain, tiny


def test_missing_mask() -> None:
    model = build_pipeline_model(tiny("fill-mask"))
    with pytest.raises(InputRejected, match=r"No mask_token \(\[MASK\]\)"):
        model.prepare("no mask here", {})


def test_text_longer_than_the_model() -> None:
    model = build_pipeline_model(tiny("text-classification"))
    with pytest.raises(InputRejected, match="the text has 152 tokens; this model takes 128 at most"):
        model.prepare("house " * 150, {})
    model.prepare("house " * 150, {"truncation": True, "max_length": 100})


@pytest.mark.parametrize(
    ("task", "text", "parameters", "complaint"),
    [
        ("fill-mask", "[MASK] " * 100, {"top_k": 1000}, "100 masks make 100000 answers; the most is 5000"),
        (
            "token-classification",
            "house " * 60_000,
            {"aggregation_strategy": "simple", "stride": 128},
            r"the input makes 15\d pieces; the most is 128",
        ),
        (
            "text-generation",
            "a",
            {"max_new_tokens": 4096},
            "3 tokens and max_new_tokens is 4096; .* takes 128",
        ),
        ("text-generation", "a", {"min_new_tokens": 126}, "3 tokens and min_new_tokens is 126; .* takes 128"),
        ("text-generation", "house " * 126, {}, "128 tokens and 1 more must fit; this model takes 128"),
        ("text-generation", "a", {"num_beams": 2, "num_return_sequences": 3}, "smaller or equal to"),
        ("text-generation", "a", {"num_return_sequences": 3, "do_sample": False}, "do not support"),
    ],
)
def test_text_and_parameters_too_large(
    task: str, text: str, parameters: dict[str, Any], complaint: str
) -> None:
    model = build_pipeline_model(tiny(task))
    model.check([text], parameters)
    with pytest.raises(InputRejected, match=complaint):
        model.prepare(text, parameters)


TRUNCATION = {"truncation": st.booleans(), "max_length": st.sampled_from([1, 2, 3, 10, 128, 10**6])}
ALLOWED: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "fill-mask": {
        "top_k": st.sampled_from([1, 7, 1000]),
        "targets": st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=9),
        "tokenizer_kwargs": st.fixed_dictionaries({}, optional=TRUNCATION),
    },
    "text-classification": {
        "top_k": st.none() | st.sampled_from([1, 1000]),
        "function_to_apply": st.sampled_from(["sigmoid", "softmax", "none"]),
        **TRUNCATION,
    },
    "token-classification": {
        "aggregation_strategy": st.sampled_from(["none", "simple", "first", "average", "max"]),
        "ignore_labels": st.lists(st.sampled_from(["O", "x"]), min_size=1),
        "stride": st.sampled_from([0, 1, 64, 128]),
    },
    "zero-shot-classification": {
        "hypothesis_template": st.sampled_from(["{}", "a {} b"]),
        "multi_label": st.booleans(),
    },
    "feature-extraction": {"tokenize_kwargs": st.fixed_dictionaries({}, optional=TRUNCATION)},
    "text-generation": {
        "max_new_tokens": st.sampled_from([1, 2, 3]),
        "min_new_tokens": st.sampled_from([0, 2]),
        "do_sample": st.booleans(),
        "temperature": st.sampled_from([0.01, 1, 100]),
        "top_k": st.sampled_from([0, 1, 1000]),
        "top_p": st.sampled_from([1e-6, 1]),
        "min_p": st.sampled_from([0, 1]),
        "typical_p": st.sampled_from([1e-6, 1]),
        "repetition_penalty": st.sampled_from([0.001, 1, 100]),
        "length_penalty": st.sampled_from([-100, 0, 100]),
        "no_repeat_ngram_size": st.sampled_from([0, 1, 100]),
        "num_beams": st.sampled_from([1, 2, 16]),
        "num_return_sequences": st.sampled_from([1, 2, 16]),
        "early_stopping": st.booleans(),
        "return_full_text": st.booleans(),
        "truncation": st.booleans(),
    },
}
TEXTS = ["", " ", "\0", "a", "a [MASK].", "[MASK] [SEP] [CLS] [PAD]", "x" * 500, "house " * 60, "\u200b"]


@pytest.mark.filterwarnings("ignore::UserWarning")  # the library comments on some combinations
@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_allowed_parameters_work(data: st.DataObject) -> None:
    task = data.draw(st.sampled_from(TASKS))
    model = build_pipeline_model(tiny(task), shortcuts=False)
    text = data.draw(st.sampled_from(TEXTS) | st.text(max_size=20))
    given_ = data.draw(st.fixed_dictionaries({}, optional=ALLOWED[task]))
    # Sampling more beams than there are candidates is a failure of the library's own.
    assume(given_.get("num_beams", 1) == 1 or given_.get("do_sample") is False)
    parameters = {**PARAMETERS.get(task, {}), **given_}
    try:
        model.check([text], parameters)
        prepared = model.prepare(text, parameters)
    except (MalformedRequest, InputRejected):
        return
    (result,) = model.step(parts([prepared]))
    plain(model.finish(prepared, result.output))


def test_other_parameters_other_key() -> None:
    model = build_pipeline_model(tiny("fill-mask"))
    text = example("fill-mask", 5)
    keys = {model.prepare(text, p).key for p in ({}, {"top_k": 1}, {"top_k": 2})}
    assert len(keys) == 3


def test_work() -> None:
    text = example("fill-mask", 10)
    assert build_pipeline_model(tiny("fill-mask")).prepare(text, {}).work == Work(1, 12, packed_tokens=12)
    zero_shot = build_pipeline_model(tiny("zero-shot-classification"))
    alone = zero_shot.prepare("x", {"candidate_labels": ["a"]}).work
    three = zero_shot.prepare("x", {"candidate_labels": ["a", "b", "c"]}).work
    assert (alone.sequences, three.sequences) == (1, 3)
    assert three.tokens == 3 * alone.tokens
