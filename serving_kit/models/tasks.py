"""What each pipeline task takes: its input, its parameters, and their bounds.

A pipeline hands parameters that it does not know to its tokenizer or to `generate`, where they are
ignored, crash the whole batch, or exhaust the machine. So a server must know them itself: this table
is the contract with clients. It is checked on the loop thread before anything is queued, in time
that does not depend on the model.

Most pipelines of `transformers` open a string as a file, or fetch it as a URL. So only pipelines with a row
here are served: those of text hand it to their tokenizer and nothing else, and those of images and sound
get what `media.py` has decoded.

Not here: what single tasks do differently (`task_steps.py`), the shape of the answer for each client
(`http/dialects/`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from serving_kit.errors import MalformedRequest, StartError
from serving_kit.models import media
from serving_kit.models.pipes import Pipe
from serving_kit.models.pooling import POOLINGS
from serving_kit.values import (
    Flag,
    Members,
    Number,
    Schema,
    Spec,
    Template,
    Text,
    Texts,
    Whole,
    object_schema,
    shown,
)


@dataclass(frozen=True, slots=True)
class Task:
    """The contract of one task.

    A parameter that has no row here does not reach the pipeline.
    """

    pipeline: str  # the class in `transformers.pipelines` whose steps it was written for
    parameters: Mapping[str, Spec] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    inputs: str = "a string"
    takes: tuple[type, ...] = (str,)
    members: tuple[str, ...] = ()  # of an object input: strings, the first of them required
    batches: bool = True  # whether several inputs may share a step
    media: Callable[[Any], Any] | None = None  # makes an image or sound of what a client sends

    def check_input(self, value: Any) -> None:
        """Raise `MalformedRequest` unless this task takes such a value."""
        fits = isinstance(value, self.takes)
        if fits and self.members and isinstance(value, dict):
            known = self.members[0] in value and value.keys() <= set(self.members)
            fits = known and all(isinstance(each, str) for each in value.values())
        if isinstance(value, list) and list in self.takes:
            fits = fits and bool(value) and all(map(_is_message, value))
        if not fits:
            raise MalformedRequest(f"inputs must be {self.inputs}, got {shown(value)}")

    def check_parameters(self, given: Mapping[str, Any]) -> None:
        """Raise `MalformedRequest` for the first parameter that is unknown, missing or impossible."""
        for name, value in given.items():
            spec = self.parameters.get(name)
            if spec is None:
                known = ", ".join(self.parameters) or "none"
                raise MalformedRequest(f"unknown parameter {shown(name)}; this task takes {known}")
            if problem := spec.problem(value):
                raise MalformedRequest(f"parameter {name} must be {problem}, got {shown(value)}")
        for name in self.required:
            if name not in given:
                example = f'{{"inputs": ..., "parameters": {{"{name}": ...}}}}'
                raise MalformedRequest(f"this task needs the parameter {name}: {example}")

    def typed(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Checked parameters in the types that pipelines take: JSON's 1 is their 1.0."""
        return {name: self.parameters[name].typed(value) for name, value in given.items()}


def _is_message(value: object) -> bool:
    """Whether a value is a message of a chat whose content is text."""
    return isinstance(value, dict) and all(isinstance(value.get(each), str) for each in ("role", "content"))


_TOKENS = Whole(1, 1_000_000)
_TRUNCATION: Mapping[str, Spec] = {"truncation": Flag(), "max_length": _TOKENS}
_GENERATION: Mapping[str, Spec] = {
    "max_new_tokens": Whole(1, 4096),
    "min_new_tokens": Whole(0, 4096),
    "do_sample": Flag(),
    "temperature": Number(0.01, 100),
    "top_k": Whole(0, 1000),
    "top_p": Number(1e-6, 1),
    "min_p": Number(0, 1),
    "typical_p": Number(1e-6, 1),
    "repetition_penalty": Number(1e-3, 100),
    "length_penalty": Number(-100, 100),
    "no_repeat_ngram_size": Whole(0, 100),
    "num_beams": Whole(1, 16),
    "num_return_sequences": Whole(1, 16),
    "early_stopping": Flag(),
    "return_full_text": Flag(),
    "stop_sequence": Texts(high=8, or_one=True),
    "truncation": Flag(),
    "details": Flag(),
    "usage": Flag(),  # of the details only the number of tokens, and why the text has ended
    "seed": Whole(0, 2**53 - 1),  # what every client's JSON can write
}

_CLASSES: Mapping[str, Spec] = {
    "top_k": Whole(1, 1000, null=True),
    "function_to_apply": Text(choices=("sigmoid", "softmax", "none")),
}

TASKS: Mapping[str, Task] = {
    "fill-mask": Task(
        "FillMaskPipeline",
        {
            "top_k": Whole(1, 1000),
            "targets": Texts(high=1000, or_one=True),
            "tokenizer_kwargs": Members(members=_TRUNCATION),
        },
    ),
    "text-classification": Task(
        "TextClassificationPipeline",
        {**_CLASSES, **_TRUNCATION},
        inputs="a string, or an object with text and text_pair",
        takes=(str, dict),
        members=("text", "text_pair"),
    ),
    "token-classification": Task(
        "TokenClassificationPipeline",
        {
            "aggregation_strategy": Text(choices=("none", "simple", "first", "average", "max")),
            "ignore_labels": Texts(high=1000),
            "stride": Whole(0, 128),
        },
    ),
    "zero-shot-classification": Task(
        "ZeroShotClassificationPipeline",
        {
            "candidate_labels": Texts(high=100, commas=True),
            "hypothesis_template": Template(),
            "multi_label": Flag(),
        },
        required=("candidate_labels",),
    ),
    "feature-extraction": Task(
        "FeatureExtractionPipeline",
        {
            "truncation": Flag(),
            "tokenize_kwargs": Members(members=_TRUNCATION),
            "pooling": Text(choices=POOLINGS),
            "normalize": Flag(),
        },
    ),
    "text-generation": Task(
        "TextGenerationPipeline",
        _GENERATION,
        inputs="a string, or a list of messages with role and content",
        takes=(str, list),
    ),
    "text-to-audio": Task("TextToAudioPipeline", batches=False),
    "image-classification": Task(
        "ImageClassificationPipeline", _CLASSES, takes=(object,), batches=False, media=media.image
    ),
    "image-feature-extraction": Task(
        "ImageFeatureExtractionPipeline", {"pool": Flag()}, takes=(object,), batches=False, media=media.image
    ),
    "object-detection": Task(
        "ObjectDetectionPipeline",
        {"threshold": Number(0, 1)},
        takes=(object,),
        batches=False,
        media=media.image,
    ),
    "audio-classification": Task(
        "AudioClassificationPipeline", _CLASSES, takes=(object,), batches=False, media=media.sound
    ),
    "automatic-speech-recognition": Task(
        "AutomaticSpeechRecognitionPipeline", takes=(object,), batches=False, media=media.sound
    ),
}


# `transformers` takes these for tasks as well, and a pipeline keeps the name that it was made with.
_OTHER_NAMES = {
    "sentiment-analysis": "text-classification",
    "ner": "token-classification",
    "text-to-speech": "text-to-audio",
}
_OPENS = "its pipeline may open the paths and addresses that clients send"


def task_name(name: str) -> str:
    """The name of a task in `TASKS`, for another one that `transformers` takes."""
    return _OTHER_NAMES.get(name, name)


def parameters_schema(task: str) -> Schema | None:
    """The JSON schema of the object with the parameters of a request.

    Args:
        task: A name that `transformers` takes. None is returned for others: a function's are not known.
    """
    known = TASKS.get(task_name(task))
    return None if known is None else object_schema(known.parameters, known.required)


def contract(pipe: Pipe) -> Task:
    """The contract of a pipeline.

    Raises:
        StartError: there is none, so that the pipeline might open or fetch what clients send.
    """
    name, task = type(pipe).__name__, TASKS.get(task_name(pipe.task))
    why = ""
    if task is None:
        why = _OPENS
    elif not any(_is_derived(each, task.pipeline) for each in type(pipe).__mro__):
        why = f"{name} is no {task.pipeline}, so it may open the paths and addresses that clients send"
    elif task_name(pipe.task) == "text-to-audio" and not _takes_text_first(getattr(pipe, "processor", None)):
        why = "its processor takes a string for an image or for sound, and opens or fetches it"
    if task is None or why:
        raise _not_served(pipe.task, why)
    return task


def refuse_unserved(task: str) -> None:
    """Raise `StartError` for a task whose pipelines would be refused: before its weights are loaded."""
    if task_name(task) not in TASKS:
        raise _not_served(task, _OPENS)


def _not_served(task: str, why: str) -> StartError:
    return StartError(
        f"{task} is not served: {why}. Served are {', '.join(TASKS)}. For another pipeline, serve a function "
        "from a list to a list that decodes what it is sent and calls the pipeline"
    )


def _is_derived(kind: type, name: str) -> bool:
    return kind.__name__ == name and kind.__module__.startswith("transformers.pipelines.")


def _takes_text_first(processor: object) -> bool:
    """Whether `processor(text)` is given a text. The library's own default takes images first."""
    if processor is None:
        return True
    try:
        _, first = list(inspect.signature(type(processor).__call__).parameters.values())[:2]
    except (TypeError, ValueError):
        return False
    return first.name == "text"
