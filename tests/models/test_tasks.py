"""No string from a client is opened as a file or fetched as a URL, by any pipeline that transformers has."""

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("torch")
pytest.importorskip("PIL.Image")

import transformers
from transformers.pipelines import PIPELINE_REGISTRY

import serving_kit
from serving_kit.errors import MalformedRequest, StartError
from serving_kit.models.pipeline import build_pipeline_model
from serving_kit.models.tasks import TASKS
from tests.support_models import PARAMETERS, example, image_file, text_to_audio, tiny, tokenizer

Serve = Callable[..., Any]
REGISTERED = sorted(PIPELINE_REGISTRY.supported_tasks)
_opened: list[str] = []
_watching = threading.Event()


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _watching.is_set():
        _opened.append(str(arguments[0]))


sys.addaudithook(_watch)  # stays until the process ends


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """The paths that this process has opened since."""
    _opened.clear()
    _watching.set()
    yield _opened
    _watching.clear()


def strings(canary: Path, address: str) -> list[Any]:
    """What a pipeline would open or fetch, in every shape that one takes."""
    plain = [str(canary), f"file://{canary}", address]
    shapes: list[Any] = [*plain, [plain[0], plain[2]]]
    for each in plain:
        shapes += [{"image": each}, {"image": each, "question": "who?"}, {"text": each, "images": each}]
        shapes += [{"url": each}, {"path": each}, {"raw": each, "sampling_rate": 16000}, {"video": each}]
        shapes += [{"role": "user", "content": [{"type": "image", "url": each}]}]
        shapes += [{"table": {"a": [each]}, "query": each}, {"text": each}, {"array": each}, {"audio": each}]
    return shapes


@pytest.mark.parametrize("task", sorted(TASKS))
def test_nothing_is_opened_or_fetched(
    serve: Serve, task: str, tmp_path: Path, fetched: tuple[str, list[str]], opened: list[str]
) -> None:
    address, asked = fetched
    canary = tmp_path / "canary.png"
    canary.write_bytes(image_file())
    server = serve(tiny(task), max_queue_size=1000)
    for value in strings(canary, address):
        for body in (value, {"inputs": value, "parameters": PARAMETERS.get(task, {})}):
            answer = httpx.post(server.url, json=body, timeout=60)
            assert answer.status_code in (200, 400, 422), (value, answer.text)
    for name in ("image", "images", "timeout", "tokenizer", "generation_config", "voice_preset", "inputs"):
        body = {"inputs": "x", "parameters": {**PARAMETERS.get(task, {}), name: str(canary)}}
        assert httpx.post(server.url, json=body, timeout=60).status_code == 400
    assert asked == []
    assert [path for path in opened if "canary" in path] == [str(canary)], (
        "the one that this test has written"
    )


@pytest.mark.parametrize("task", [task for task in REGISTERED if task not in TASKS])
def test_other_pipelines_are_refused(task: str) -> None:
    implementation = PIPELINE_REGISTRY.check_task(task)[1]["impl"]
    kind = (
        getattr(transformers, implementation.rpartition(".")[2])
        if isinstance(implementation, str)
        else implementation
    )
    pipe = kind.__new__(kind)  # most cannot be made without weights: what it is has to be enough
    pipe.task, pipe.model = task, tiny("fill-mask").model
    with pytest.raises(
        StartError, match=f"{task} is not served: .* addresses that clients send.* a function"
    ):
        serving_kit.serve(pipe, port=0)


def test_unserved_task_loads_nothing() -> None:
    with pytest.raises(StartError, match="depth-estimation is not served"):
        serving_kit.serve("no-owner/no-such-model", task="depth-estimation", port=0)


def layoutlm() -> Any:
    config = transformers.LayoutLMConfig(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = transformers.LayoutLMForQuestionAnswering(config).eval()
    return transformers.pipeline(
        "document-question-answering", model=model, tokenizer=tokenizer(), device="cpu"
    )


def test_document_without_image_processor() -> None:
    pipe = layoutlm()
    assert pipe.image_processor is None
    assert pipe.feature_extractor is None
    with pytest.raises(StartError, match="document-question-answering is not served"):
        serving_kit.serve(pipe, port=0)


class Opening(transformers.Pipeline):
    """A pipeline that is not the library's, and opens what it is given."""

    def _sanitize_parameters(self, **_: Any) -> Any:
        return {}, {}, {}

    def preprocess(self, inputs: Any, **_: Any) -> Any:
        return {"text": Path(inputs).read_text()}

    def _forward(self, model_inputs: Any, **_: Any) -> Any:
        return model_inputs

    def postprocess(self, model_outputs: Any, **_: Any) -> Any:
        return model_outputs


@pytest.mark.parametrize("task", ["my-task", "text-classification"])
def test_foreign_pipeline_class(task: str) -> None:
    pipe = Opening(model=tiny("text-classification").model, device="cpu", task=task)
    with pytest.raises(StartError, match=r"is not served: .* that clients send.* a function"):
        serving_kit.serve(pipe, port=0)


def test_task_name_on_another_class() -> None:
    pipe = copy.copy(layoutlm())
    pipe.task = "fill-mask"
    with pytest.raises(StartError, match="DocumentQuestionAnsweringPipeline is no FillMaskPipeline"):
        serving_kit.serve(pipe, port=0)


def test_derived_pipeline_class(serve: Serve) -> None:
    class Derived(transformers.TextClassificationPipeline):
        def postprocess(self, *arguments: Any, **more: Any) -> Any:
            answer = super().postprocess(*arguments, **more)
            return {**answer, "label": answer["label"].upper()}

    plain = tiny("text-classification")
    pipe = Derived(model=plain.model, tokenizer=plain.tokenizer, task=plain.task, device="cpu")
    assert serve(pipe)("it rains")[0]["label"] == plain("it rains")[0]["label"].upper()


def test_image_processor_for_speech() -> None:
    """Refused: `TextToAudioPipeline` calls `processor(text)`, and the default one takes images first."""
    processor = transformers.CLIPProcessor.__new__(transformers.CLIPProcessor)
    processor.tokenizer = tokenizer()
    pipe = text_to_audio()
    pipe.processor = processor
    with pytest.raises(StartError, match="takes a string for an image or for sound"):
        serving_kit.serve(pipe, port=0)
    melody = transformers.MusicgenMelodyProcessor.__new__(transformers.MusicgenMelodyProcessor)
    pipe.processor = melody
    with pytest.raises(StartError, match="takes a string for an image or for sound"):
        serving_kit.serve(pipe, port=0)


def test_tasks_of_the_library() -> None:
    """A new release of the library may rename a pipeline, and its contract would no longer hold."""
    for task, contract in TASKS.items():
        assert task in REGISTERED
        assert hasattr(transformers, contract.pipeline)


@pytest.mark.parametrize(
    ("alias", "task"), [("sentiment-analysis", "text-classification"), ("ner", "token-classification")]
)
def test_alias_of_a_task(serve: Serve, alias: str, task: str) -> None:
    """A pipeline keeps the name that it was made with; it is served as the task of that alias."""
    pipe = copy.copy(tiny(task))
    pipe.task = alias
    server = serve(pipe, max_batch_size=4)
    text = example(task, 8)
    assert server(text) == serve(tiny(task), name="other")(text)
    assert httpx.get(f"{server.url}/info").json()["task"] == task
    assert pipe.task == alias


# -- parameters and inputs of a request ---------------------------------------------------------------


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
def test_parameters_out_of_bounds(task: str, parameters: dict[str, Any], complaint: str) -> None:
    with pytest.raises(MalformedRequest, match=complaint):
        build_pipeline_model(tiny(task)).check(["x"], parameters)


@pytest.mark.parametrize("value", [1, None, True, ["a"], {"a": 1}, {"text": 1}, {"text_pair": "x"}])
def test_input_of_the_wrong_type(value: Any) -> None:
    for task in ("fill-mask", "text-classification"):
        with pytest.raises(MalformedRequest, match="inputs must be"):
            build_pipeline_model(tiny(task)).check([value], {})
