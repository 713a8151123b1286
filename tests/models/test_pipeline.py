"""A served pipeline answers what the pipeline answers, alone and in a batch, for every text task."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from serving_kit import execution
from serving_kit.errors import InputRejected, MalformedRequest, ModelFailed, StartError
from serving_kit.http.strict_json import dump_json
from serving_kit.models.functions import CallableModel
from serving_kit.models.loading import load_model
from serving_kit.models.pipeline import PipelineModel
from serving_kit.service import Service
from tests.tiny import PARAMETERS, TASKS, example, tiny

LENGTHS = [3, 40, 11, 11, 25]


def plain(value: Any) -> Any:
    """As a client sees it."""
    return json.loads(dump_json(value))


def assert_same(got: Any, want: Any) -> None:
    """Equal in structure and words; equal in numbers to 1e-5."""
    assert type(got) is type(want)
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        for key in want:
            assert_same(got[key], want[key])
    elif isinstance(want, list):
        assert len(got) == len(want)
        for each in zip(got, want, strict=True):
            assert_same(*each)
    elif isinstance(want, float):
        assert got == pytest.approx(want, abs=1e-5)
    else:
        assert got == want


def answers(model: PipelineModel, texts: list[str], parameters: dict[str, Any]) -> list[Any]:
    prepared = [model.prepare(text, parameters) for text in texts]
    outputs = model.forward(prepared)
    assert len(outputs) == len(texts)
    return [plain(model.finish(output, given)) for output, given in zip(outputs, prepared, strict=True)]


@pytest.mark.parametrize("task", TASKS)
def test_alone_an_input_gets_exactly_what_the_pipeline_returns(task: str) -> None:
    pipe, parameters, text = tiny(task), PARAMETERS.get(task, {}), example(task, 12)
    model = PipelineModel(pipe, shortcuts=False)
    got, want = answers(model, [text], parameters), [plain(pipe(text, **parameters))]
    if task == "zero-shot-classification":  # its labels share a forward here: the last digits differ
        assert_same(got, want)
    else:
        assert got == want


@pytest.mark.parametrize("task", TASKS)
def test_in_a_batch_of_mixed_lengths_it_gets_the_same(task: str) -> None:
    pipe, parameters = tiny(task), PARAMETERS.get(task, {})
    texts = [example(task, words) for words in LENGTHS]
    want = [plain(pipe(text, **parameters)) for text in texts]
    assert_same(answers(PipelineModel(pipe), texts, parameters), want)


@pytest.mark.parametrize(
    ("task", "parameters"),
    [
        ("fill-mask", {"top_k": 2}),
        ("fill-mask", {"targets": ["house", "river"]}),
        ("text-classification", {"top_k": 2}),
        ("text-classification", {"top_k": None}),
        ("text-classification", {"function_to_apply": "sigmoid"}),
        ("token-classification", {"aggregation_strategy": "simple"}),
        ("token-classification", {"aggregation_strategy": "max", "stride": 4}),
        ("zero-shot-classification", {"candidate_labels": ["a", "b"], "multi_label": True}),
        ("zero-shot-classification", {"candidate_labels": ["a"], "hypothesis_template": "It is {}!"}),
        ("text-generation", {"max_new_tokens": 3, "do_sample": False, "return_full_text": False}),
        ("text-generation", {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}),
        ("feature-extraction", {"tokenize_kwargs": {"truncation": True, "max_length": 5}}),
    ],
)
def test_parameters_mean_what_they_mean_to_the_pipeline(task: str, parameters: dict[str, Any]) -> None:
    pipe = tiny(task)
    model = PipelineModel(pipe)
    texts = [example(task, words) for words in (4, 30)]
    model.check(texts, parameters)
    assert_same(answers(model, texts, parameters), [plain(pipe(text, **parameters)) for text in texts])


def test_a_text_pair_is_classified_as_a_pair() -> None:
    pipe = tiny("text-classification")
    model = PipelineModel(pipe)
    pair = {"text": "it rains", "text_pair": "the sun shines"}
    model.check([pair], {})
    assert_same(answers(model, [pair, "it rains"], {})[1], plain(pipe("it rains")))
    assert_same(answers(model, [pair], {})[0][0], plain(pipe(pair)))


def test_a_missing_mask_is_the_clients_mistake_and_the_text_says_so() -> None:
    model = PipelineModel(tiny("fill-mask"))
    with pytest.raises(InputRejected, match=r"No mask_token \(\[MASK\]\)"):
        model.prepare("no mask here", {})


def test_a_text_longer_than_the_model_is_refused_with_both_numbers() -> None:
    model = PipelineModel(tiny("text-classification"))
    with pytest.raises(InputRejected, match="the text has 152 tokens; this model takes 128 at most"):
        model.prepare("house " * 150, {})
    model.prepare("house " * 150, {"truncation": True, "max_length": 100})


@pytest.mark.parametrize(
    ("task", "parameters", "complaint"),
    [
        ("fill-mask", {"topk": 3}, "unknown parameter 'topk'; this task takes top_k"),
        ("fill-mask", {"top_k": 10**9}, "top_k must be a whole number from 1 to 1000, got 1000000000"),
        ("fill-mask", {"top_k": True}, "top_k must be a whole number"),
        ("fill-mask", {"targets": ["x"] * 2000}, "targets must be a list of 1 to 1000 strings"),
        ("fill-mask", {"tokenizer_kwargs": {"padding": True}}, "an object with some of truncation"),
        ("text-classification", {"function_to_apply": "exp"}, "one of sigmoid, softmax, none"),
        ("zero-shot-classification", {}, "needs the parameter candidate_labels"),
        ("zero-shot-classification", {"candidate_labels": ["a"], "hypothesis_template": "no"}, "exactly one"),
        ("text-generation", {"max_new_tokens": 10**6}, "from 1 to 4096"),
        ("text-generation", {"tokenizer": "/etc/passwd"}, "unknown parameter"),
        ("feature-extraction", {"return_tensors": True}, "unknown parameter"),
        ("zero-shot-classification", {"candidate_labels": ["a"] * 10**6}, "a list of 1 to 100 strings"),
        ("zero-shot-classification", {"candidate_labels": "a," * 101}, "a list of 1 to 100 strings"),
        ("token-classification", {"stride": 10**6}, "a whole number from 0 to 128"),
        ("image-classification", {"timeout": 1}, "unknown parameter"),
    ],
)
def test_parameters_that_are_unknown_or_could_exhaust_the_machine_are_refused(
    task: str, parameters: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(MalformedRequest, match=complaint):
        PipelineModel(tiny(task)).check(["x"], parameters)


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
def test_what_only_text_and_parameters_together_make_too_large_is_refused(
    task: str, text: str, parameters: dict[str, Any], complaint: str
) -> None:
    model = PipelineModel(tiny(task))
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
def test_parameters_that_are_allowed_never_make_the_model_fail(data: st.DataObject) -> None:
    task = data.draw(st.sampled_from(TASKS))
    model = PipelineModel(tiny(task), shortcuts=False)
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
    plain(model.finish(model.forward([prepared])[0], prepared))


@pytest.mark.parametrize("value", [1, None, True, ["a"], {"a": 1}, {"text": 1}, {"text_pair": "x"}])
def test_an_input_of_the_wrong_type_is_refused(value: Any) -> None:
    for task in ("fill-mask", "text-classification"):
        with pytest.raises(MalformedRequest, match="inputs must be"):
            PipelineModel(tiny(task)).check([value], {})


def test_inputs_with_other_parameters_are_of_another_group() -> None:
    model = PipelineModel(tiny("fill-mask"))
    text = example("fill-mask", 5)
    groups = {model.prepare(text, p).group for p in ({}, {"top_k": 1}, {"top_k": 2})}
    assert len(groups) == 3


def test_a_length_is_counted_in_tokens_and_chunks() -> None:
    text = example("fill-mask", 10)
    assert PipelineModel(tiny("fill-mask")).prepare(text, {}).tokens == 12
    labels = {"candidate_labels": ["a", "b", "c"]}
    zero_shot = PipelineModel(tiny("zero-shot-classification"))
    alone = zero_shot.prepare("x", {"candidate_labels": ["a"]}).tokens
    assert zero_shot.prepare("x", labels).tokens == 3 * alone


def test_a_pipeline_without_pad_token_runs_one_by_one_and_says_why() -> None:
    import copy

    pipe = copy.copy(tiny("text-generation"))
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    pipe.tokenizer.pad_token = None
    model = PipelineModel(pipe)
    assert model.max_batch_size == 1
    assert "pad_token = pipe.tokenizer.eos_token" in model.batch_obstacle


def test_a_folder_is_loaded_once_and_a_pipeline_not_again(tmp_path: Any) -> None:
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
        ({"model": "nobody/no-such-model", "task": "fill-mask"}, "the Hub cannot be reached"),
        ({"model": "x/y", "task": "fill-masc"}, "Unknown task fill-masc"),
        ({"model": 42}, "cannot serve int: pass a Hub id"),
        ({"model": len, "task": "fill-mask"}, "are for loading a model by its id"),
    ],
)
def test_a_model_that_cannot_be_loaded_says_what_to_do(
    arguments: dict[str, Any], advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no network in tests
    with pytest.raises(StartError, match=advice):
        load_model(**arguments)


def test_out_of_memory_while_loading_names_the_remedies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: out of memory: 1 TB")

    monkeypatch.setattr("transformers.pipeline", no_memory)
    with pytest.raises(StartError, match=r"smaller model.*stop_first=True"):
        load_model(tmp_path, task="fill-mask")


@pytest.mark.parametrize("task", [task for task in TASKS if task != "text-generation"])
def test_what_a_batch_costs_is_known_when_a_model_is_loaded(task: str) -> None:
    service = Service(load_model(tiny(task)))
    cost = service.batcher.scheduler.cost
    assert cost.known
    assert cost.seconds(10) > 0


@pytest.mark.parametrize("task", TASKS)
def test_a_model_keeps_the_input_that_warmed_it_up_as_its_example(task: str) -> None:
    model = load_model(tiny(task))
    assert model.example is not None
    model.check([model.example[0]], model.example[1])
    assert execution.probe(model, *model.example)


def test_a_function_has_no_example_since_it_never_sees_what_nobody_sent() -> None:
    seen: list[Any] = []
    model = load_model(lambda xs: seen.extend(xs) or xs)
    assert model.example is None
    assert not seen


def test_bad_inputs_alone_do_not_close_a_server_that_has_answered_nothing_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        model = load_model(tiny("fill-mask"))
        answer = model.forward

        def picky(batch: Any) -> Any:
            if any(each.tokens > 8 for each in batch):
                raise ValueError
            return answer(batch)

        monkeypatch.setattr(model, "forward", picky)
        service = Service(model)
        await service.start()
        for _ in range(6):
            with service.observe() as ticket, pytest.raises(ModelFailed):
                await service.predict(["a word " * 9 + "[MASK]."], {}, ticket)
        with service.observe() as ticket:
            assert len(await service.predict(["a [MASK]."], {}, ticket)) == 1
        assert await service.stop()

    asyncio.run(main())


def test_numpy_answers_become_numbers() -> None:
    assert dump_json({"a": np.float32(0.5), "b": np.arange(3)}) == b'{"a":0.5,"b":[0,1,2]}'


async def asynchronous(texts: list[str]) -> list[str]:
    return texts


def test_an_async_function_is_refused() -> None:
    with pytest.raises(StartError, match="not async"):
        load_model(asynchronous)


def test_a_function_gets_the_whole_list_and_its_own_parameters() -> None:
    def scale(xs: list[float], held: str = "mine", *, by: float = 1.0) -> list[float]:
        assert held == "mine"
        return [x * by for x in xs]

    model = CallableModel(scale)
    model.check([1.0], {"by": 2.0})
    with pytest.raises(MalformedRequest, match="takes by"):
        model.check([1.0], {"held": "theirs"})
    batch = [model.prepare(x, {"by": 3.0}) for x in (1.0, 2.0)]
    assert model.forward(batch) == [3.0, 6.0]


@pytest.mark.parametrize("wrong", ["text", b"bytes", {"a": 1}, 5, None])
def test_a_function_that_returns_no_list_is_told_so(wrong: Any) -> None:
    model = CallableModel(lambda xs: wrong)
    with pytest.raises(TypeError, match="must return a list"):
        model.forward([model.prepare("x", {})])
